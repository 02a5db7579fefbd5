"""FLOPs of an update are those of the shapes that pass by, buckets and LPL included; MFU is a share
of a known device's peak.
"""

import pytest
import torch

from lpl_pretrain.config.dataset import BucketEntry
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision
from lpl_pretrain.losses.term import LossTerm
from lpl_pretrain.planning.flops import count_flops, on_meta
from lpl_pretrain.planning.peak import peak_flops
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.mfu import FlopsPerUpdate, denoiser_flops
from tests.support.configs import dataset_index, train_config
from tests.support.latents import tiny_dataset
from tests.support.updates import batches_of, term

CPU = torch.device("cpu")


def test_dit_xl2_at_256_px():
    """118.6 GMAC forward (platform notes, arXiv 2212.09748 table 4); backward is twice that."""
    config = train_config(
        model={"kind": "dit", "width": 1152, "depth": 28, "heads": 16, "patch_size": 2}
    )
    assert denoiser_flops(config, dataset_index(side=32)) == pytest.approx(3 * 237.2e9, rel=0.01)


def test_buckets_are_weighted_by_their_samples():
    config, square = train_config(), dataset_index(side=16)
    wide = square.model_copy(update={"buckets": [BucketEntry(height=16, width=32, samples=32)]})
    both = square.model_copy(
        update={
            "samples": 32,
            "buckets": [
                BucketEntry(height=16, width=16, samples=24),
                BucketEntry(height=16, width=32, samples=8),
            ],
        }
    )
    one, two = denoiser_flops(config, square), denoiser_flops(config, wide)
    assert (
        denoiser_flops(config, both) == pytest.approx(0.75 * one + 0.25 * two) and two > 1.9 * one
    )


def test_flops_of_a_real_update_match_the_estimate(tmp_path):
    """Counts FLOPs during a real update with LPL and padding."""
    latents, autoencoder = tiny_dataset(tmp_path)
    lpl = {
        "weight": 1.0,
        "gate": {"noise_level_below": 0.7},
        "activation_checkpointing": False,
        "chunk_size": 1,
    }
    config = train_config(
        data__folder=latents,
        autoencoder=autoencoder,
        lpl=lpl,
        batch={"global_batch_size": 8, "micro_batch_size": 2},
    )
    run = assemble(config, RunDir(tmp_path), World(), CPU)
    batches = batches_of(run, 0)
    counted = count_flops(lambda: run.updater.update(0, batches, Meter(CPU), Clock(CPU)))
    lpl = term(run).flops_per_update()
    assert lpl > 0
    assert counted == pytest.approx(run.flops.denoiser + lpl, rel=0.01)
    assert run.flops.peak is None and run.flops.throughput(2.0, range(4)) == {
        "tflops_per_s": pytest.approx(2 * counted / 1e12, rel=0.01)
    }


def test_a_copy_on_meta_has_no_data_and_leaves_the_original_alone():
    module = torch.nn.Sequential(
        torch.nn.Linear(2, 3).requires_grad_(False), torch.nn.BatchNorm1d(3)
    )
    copy = on_meta(module)
    assert {tensor.device.type for tensor in [*copy.parameters(), *copy.buffers()]} == {"meta"}
    assert [p.requires_grad for p in copy.parameters()] == [False, False, True, True]
    assert all(p.device.type == "cpu" for p in module.parameters()) and module(
        torch.ones(4, 2)
    ).shape == (4, 3)


@pytest.mark.parametrize(
    "device, precision, tera",
    [
        ("NVIDIA H100 80GB HBM3", Precision.BF16, 989),
        ("NVIDIA H100 PCIe", Precision.BF16, 756),
        ("NVIDIA A100-SXM4-80GB", Precision.BF16, 312),
        ("Tesla V100-SXM2-16GB", Precision.FP16, 125),
        ("NVIDIA L40S", Precision.FP8, 733),
        ("NVIDIA L4", Precision.BF16, 121),
        ("NVIDIA A100-SXM4-80GB", Precision.FP8, None),
        ("cpu", Precision.BF16, None),
    ],
)
def test_peaks(device, precision, tera):
    assert peak_flops(device, precision) == (None if tera is None else tera * 1e12)


def test_mfu():
    """Four updates, the last two of them with a second term."""
    flops = FlopsPerUpdate(6e14, [CountedTerm(0, 0.0), CountedTerm(8, 2e14)], peak=1e15)
    assert flops.throughput(4.0, range(6, 10)) == {"tflops_per_s": 700.0, "mfu": 0.7}


class CountedTerm(LossTerm):
    """Active from `start` on, at `flops` an update."""

    name = "counted"

    def __init__(self, start, flops):
        self.start = start
        self.flops = flops

    def __call__(self, draws, out, meter):
        raise NotImplementedError

    def active(self, step):
        return step >= self.start

    def flops_per_update(self):
        return self.flops
