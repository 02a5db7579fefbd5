"""A rank that is slow by itself is named in metrics.jsonl, with its host, though all ranks' steps
take equally long.
"""

from __future__ import annotations

import pytest

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.runtime import timer
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.trainer import stragglers
from lpl_pretrain.trainer.loop import train
from lpl_pretrain.trainer.step import Updater
from tests.support.commands import metric_lines
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks

RANKS, SLOW_RANK, UPDATE_S = 3, 1, 0.06


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


class Clock:
    """In place of the timers' `time`: it goes on only where a test says so, whatever the load of
    the machine.
    """

    now = 0.0

    def perf_counter(self):
        return self.now

    def passing(self, seconds, function):
        """`function`, which takes so long."""

        def call(*args, **options):
            self.now += seconds
            return function(*args, **options)

        return call

    def late(self, seconds, batches):
        for batch in batches:
            self.now += seconds
            yield batch


def train_slowly(world, device, data, folder, measure):
    """Rank SLOW_RANK is slow by `measure`; all other ranks are alike."""
    slow, clock = world.rank == SLOW_RANK, Clock()
    config = train_config(
        data__folder=data[0],
        autoencoder=data[1],
        steps=8,
        batch__global_batch_size=6,
        parallel={"strategy": "ddp"},
    )
    prefetch = LatentStream.prefetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: f"node{world.rank}")
        patch.setattr(timer, "time", clock)
        patch.setattr(stragglers, "LOOK_S", 0.0)
        patch.setattr(Updater, "update", clock.passing(UPDATE_S, Updater.update))
        patch.setattr(
            stragglers, "run_delay", lambda: clock.now / 2 if slow and measure == "core" else 0.0
        )
        if slow and measure == "data":
            patch.setattr(
                LatentStream, "prefetch", lambda *args: clock.late(2 * UPDATE_S, prefetch(*args))
            )
        patch.setattr(
            stragglers.Probe, "_go", lambda self: 0.008 if slow and measure == "device" else 0.001
        )
        return train(config, RunDir(folder), world, device, StopRequest())


@pytest.mark.parametrize("measure", [*stragglers.MEASURES, "nothing"])
def test_the_slow_rank_is_named(data, tmp_path, measure):
    assert all(run_ranks(RANKS, train_slowly, data, tmp_path, measure))
    told = metric_lines(tmp_path)
    called = [
        (line["rank"], line["host"], line["measure"])
        for line in told
        if line.get("event") == "straggler"
    ]
    assert called == ([] if measure == "nothing" else [(SLOW_RANK, f"node{SLOW_RANK}", measure)])
    last = told[-1]
    spreads = {name: last[f"ranks/{name}_spread"] for name in stragglers.MEASURES}
    assert {name for name, times in spreads.items() if times > stragglers.SLOW} == {measure} - {
        "nothing"
    }, spreads
    assert measure == "nothing" or last[f"ranks/{measure}_slowest"] == SLOW_RANK


def test_one_process_tells_nothing_of_ranks(data, tmp_path):
    (complete,) = run_ranks(1, train_slowly, data, tmp_path, "data")
    assert complete and not [
        key for line in metric_lines(tmp_path) for key in line if key.startswith("ranks/")
    ]
