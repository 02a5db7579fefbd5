"""The host waits for the device at log steps only.

Counted over 20 updates on CPU tensors: reads of single values (HostReads), and copies to Python
(`tolist`, `cpu`, `numpy`, `item`) that this package asks for.  ZeRO: DeepSpeed's engine reads the
gradient norm, which is named here.
"""

import sys
from pathlib import Path

import pytest
import torch

import lpl_pretrain
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.runtime.dist import AgreedFlags
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.configs import train_config
from tests.support.host_reads import HostReads
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks
from tests.support.training import ROOT, ZERO_CONFIGS
from tests.support.updates import batches_of

UPDATES = 20
PACKAGE = str(Path(lpl_pretrain.__file__).parent)
COPIES = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__")


class Copies:
    """Records (file, line) of each call in `COPIES` made by a file of the package."""

    def __init__(self, patch):
        self.calls = []
        for name in COPIES:
            patch.setattr(torch.Tensor, name, self.counting(getattr(torch.Tensor, name)))

    def counting(self, plain):
        def call(tensor, *args, **kwargs):
            code = sys._getframe(1).f_code
            if code.co_filename.startswith(PACKAGE):
                self.calls.append(f"{Path(code.co_filename).name}:{code.co_name}")
            return plain(tensor, *args, **kwargs)

        return call


def reads_of_updates(world, device, data, strategy):
    """(values read by anyone, copies asked for by the package) during UPDATES updates."""
    parallel = {"strategy": strategy, "precision": "fp32"}
    if strategy in ZERO_CONFIGS:
        parallel |= {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
    config = train_config(
        data__folder=data[0],
        autoencoder=data[1],
        steps=100,
        batch={"global_batch_size": 8, "micro_batch_size": 4 // world.world_size},
        parallel=parallel,
        lpl={"target_fraction": 0.2, "calibration_steps": 50, "gate": {"noise_level_below": 0.7}},
    )
    run = assemble(config, RunDir(Path("never_written")), world, device)
    meter = Meter(device)
    clock = Clock(device)
    flags = AgreedFlags(2)
    batches = [batches_of(run, step) for step in range(UPDATES)]
    run.updater.update(0, batches[0], meter, clock)  # tables are filled once
    with pytest.MonkeyPatch.context() as patch:
        copies = Copies(patch)
        with HostReads() as reads:
            for step in range(UPDATES):
                run.updater.update(1 + step, batches[step], meter, clock)
                run.ema.update(2 + step)
                flags.read(False, False)
                flags.post(False, False)
    flags.read(False, False)
    assert meter.flush()["loss/lpl"] > 0
    calls = [call for call in copies.calls if call != "dist.py:read"]  # the flags lie on the host
    return [reads.count, sorted(set(calls))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def test_local(data):
    assert reads_of_updates(World(), torch.device("cpu"), data, "local") == [0, []]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sharded(data, strategy):
    assert run_ranks(2, reads_of_updates, data, strategy) == [[0, []]] * 2


def test_zero_reads_the_norm_in_the_engine_and_nothing_else(data):
    for count, calls in run_ranks(2, reads_of_updates, data, "zero2"):
        assert count >= UPDATES  # DeepSpeed: overflow and clipping
        assert calls == []


def test_a_read_in_the_update_is_noticed(data):
    """The mistake: the norm of each update is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        plain = Meter.end_update

        def looks(self, *, applied):
            plain(self, applied=applied)
            return bool(applied)

        patch.setattr(Meter, "end_update", looks)
        count, _ = reads_of_updates(World(), torch.device("cpu"), data, "local")
    assert count == UPDATES
