"""metrics.jsonl names the slow rank and its host, though all ranks' steps take equally long."""

from __future__ import annotations

import pytest

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.runtime import timer
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.trainer import stragglers
from lpl_pretrain.trainer.loop import train
from lpl_pretrain.trainer.update import Updater
from tests.support.commands import metric_lines
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks

RANKS, SLOW_RANK, UPDATE_S = 3, 1, 0.06


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


class FakeTime:
    """Replacement for the timers' `time` that advances only where a test says so.

    Real time plays no part, so the load of the machine cannot change a result.
    """

    now = 0.0

    def perf_counter(self):
        return self.now

    def delayed(self, seconds, function):
        """`function`, taking `seconds`."""

        def call(*args, **options):
            self.now += seconds
            return function(*args, **options)

        return call

    def delayed_batches(self, seconds, batches):
        """`batches`, each after a wait of `seconds`."""
        for batch in batches:
            self.now += seconds
            yield batch


def train_slowly(world, device, data, folder, measure):
    """Train with SLOW_RANK slow in `measure`, and all other ranks equal."""
    slow = world.rank == SLOW_RANK
    fake_time = FakeTime()
    config = train_config(
        data__folder=data[0],
        autoencoder=data[1],
        steps=8,
        batch__global_batch_size=6,
        parallel={"strategy": "ddp"},
    )
    prefetch = LatentStream.prefetch_with
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: f"node{world.rank}")
        patch.setattr(timer, "time", fake_time)
        patch.setattr(stragglers, "MEASURE_EVERY_S", 0.0)
        patch.setattr(Updater, "update", fake_time.delayed(UPDATE_S, Updater.update))
        patch.setattr(
            stragglers,
            "run_delay",
            lambda: fake_time.now / 2 if slow and measure == "core" else 0.0,
        )
        if slow and measure == "data":
            patch.setattr(
                LatentStream,
                "prefetch_with",
                lambda *args: fake_time.delayed_batches(2 * UPDATE_S, prefetch(*args)),
            )
        patch.setattr(
            stragglers.Probe,
            "_probe_once",
            lambda self: 0.008 if slow and measure == "device" else 0.001,
        )
        return train(config, RunDir(folder), world, device, StopRequest())


@pytest.mark.parametrize("measure", [*stragglers.MEASURES, "nothing"])
def test_the_slow_rank_is_named(data, tmp_path, measure):
    assert all(run_ranks(RANKS, train_slowly, data, tmp_path, measure))
    lines = metric_lines(tmp_path)
    stragglers_logged = [
        (line["rank"], line["host"], line["measure"])
        for line in lines
        if line.get("event") == "straggler"
    ]
    assert stragglers_logged == (
        [] if measure == "nothing" else [(SLOW_RANK, f"node{SLOW_RANK}", measure)]
    )
    last = lines[-1]
    spreads = {name: last[f"ranks/{name}_spread"] for name in stragglers.MEASURES}
    assert {name for name, times in spreads.items() if times > stragglers.SLOW_FACTOR} == {
        measure
    } - {"nothing"}, spreads
    assert measure == "nothing" or last[f"ranks/{measure}_slowest"] == SLOW_RANK


def test_one_process_logs_nothing_about_ranks(data, tmp_path):
    (complete,) = run_ranks(1, train_slowly, data, tmp_path, "data")
    assert complete and not [
        key for line in metric_lines(tmp_path) for key in line if key.startswith("ranks/")
    ]
