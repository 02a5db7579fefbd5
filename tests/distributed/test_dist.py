"""The collectives of runtime/dist.py, and the launcher of these tests."""

from __future__ import annotations

import time

import pytest
import torch

from lpl_pretrain.runtime import dist
from lpl_pretrain.runtime.world import World
from tests.support.ranks import RankFailed, run_ranks


def collectives(world, device):
    assert World.from_environment() == world
    return {
        "mean": dist.mean_over_ranks(torch.tensor([float(world.rank), 1.0])),
        "rows": dist.all_gather_rows(torch.tensor([world.rank, 7], dtype=torch.uint8)),
        "any": [*dist.any_over_ranks(world.rank == 1, False)],
        "first": [
            dist.first_error(f"rank {world.rank}" if world.rank else None),
            dist.first_error(None),
        ],
        "json": dist.broadcast_json({"rank": world.rank, "é": [1, None, 2.5], "t": (1,)}),
    }


def test_collectives_agree():
    results = run_ranks(3, collectives)
    for result in results:
        assert result["mean"].tolist() == [1.0, 1.0]
        assert result["rows"].tolist() == [[0, 7], [1, 7], [2, 7]]
        assert result["any"] == [True, False]
        assert result["first"] == ["rank 1", None]
        assert result["json"] == {"rank": 0, "é": [1, None, 2.5], "t": [1]}


def test_collectives_without_a_group_are_the_identity():
    value = torch.tensor([2.0])
    assert dist.mean_over_ranks(value) is not value and dist.mean_over_ranks(value).item() == 2.0
    assert dist.all_gather_rows(value).tolist() == [[2.0]]
    assert dist.any_over_ranks(True, False) == [True, False]
    assert dist.first_error("a") == "a" and dist.first_error(None) is None
    assert dist.broadcast_json({"t": (1,)}) == {"t": [1]}
    dist.barrier()
    dist.shutdown()


def fails_on_rank_1(world, device):
    if world.rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_launcher_raises_the_failure_of_a_rank():
    with pytest.raises(RankFailed, match="fails_on_rank_1[^$]*KeyError: 'the reason'"):
        run_ranks(2, fails_on_rank_1)


def test_launcher_has_a_time_limit():
    with pytest.raises(RankFailed, match="still ran after 0.5 s"):
        run_ranks(2, lambda world, device: time.sleep(60), timeout_s=0.5)
