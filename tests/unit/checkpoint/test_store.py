"""Ranges written by any number of ranks are read into any other layout; the files are plain
safetensors.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from lpl_pretrain.checkpoint.store import Reader, load_full, merge_parts, rank_file, write_rank
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.parallel.strategy import ParamRange

SHAPES = {"a.weight": (7, 5), "b": (1,), "c.bias": (3, 2, 4)}
KINDS = ("param", "ema")


def full_tensors() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in KINDS
    }


def random_ranges(numel: int, ranks: int, seed: int) -> list[tuple[int, int]]:
    """Random contiguous ranges of the ranks, some of them empty."""
    inner = sorted(random.Random(seed).choices(range(numel + 1), k=ranks - 1))
    return list(zip([0, *inner], [*inner, numel], strict=True))


def owned(tensors, rank: int, ranks: int, seed: int) -> list[tuple[str, ParamRange]]:
    """(kind, range) of everything that `rank` owns."""
    entries = []
    for kind in KINDS:
        for index, (name, tensor) in enumerate(tensors[kind].items()):
            start, stop = random_ranges(tensor.numel(), ranks, seed + index)[rank]
            if start < stop:
                flat = tensor.view(-1)
                entries.append((kind, ParamRange(name, SHAPES[name], start, flat[start:stop])))
    return entries


def write(folder, tensors, ranks: int, seed: int):
    for rank in range(ranks):
        write_rank(folder, rank, owned(tensors, rank, ranks, seed))
    return merge_parts(folder, ranks)


@pytest.mark.parametrize(
    "ranks, readers, seed", [(1, 1, 0), (3, 1, 1), (2, 5, 2), (5, 2, 3), (4, 4, 4)]
)
def test_any_layout_is_read_into_any_other(tmp_path, ranks, readers, seed):
    tensors = full_tensors()
    files = write(tmp_path, tensors, ranks, seed)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert all(
        (tmp_path / name).stat().st_size == record.bytes
        and file_sha256(tmp_path / name) == record.sha256
        for name, record in files.items()
    )
    for kind in KINDS:
        assert all(
            torch.equal(tensor, tensors[kind][name])
            for name, tensor in load_full(tmp_path, kind).items()
        )
    empty = {
        kind: {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
        for kind in KINDS
    }
    for rank in range(readers):
        reader = Reader(tmp_path)
        for kind, param_range in owned(empty, rank, readers, seed + 100):
            reader.fill(kind, param_range)
    assert all(
        torch.equal(empty[kind][name], tensors[kind][name]) for kind in KINDS for name in SHAPES
    )


def test_files_are_plain_safetensors(tmp_path):
    tensors = full_tensors()
    write(tmp_path, tensors, 1, 0)
    loaded = load_file(tmp_path / rank_file(0))
    assert torch.equal(loaded["ema/a.weight"], tensors["ema"]["a.weight"].view(-1))
    assert len(loaded) == len(SHAPES) * len(KINDS)


@pytest.mark.parametrize("lost", ["first", "middle", "last"])
def test_a_gap_is_refused_when_saving(tmp_path, lost):
    """Ranges that do not tile a parameter mean that a strategy has misread its engine, and a
    checkpoint would be incomplete.
    """
    tensor = torch.zeros(9)
    ranges = [(0, 3), (3, 6), (6, 9)]
    del ranges[["first", "middle", "last"].index(lost)]
    for rank, (start, stop) in enumerate(ranges):
        write_rank(tmp_path, rank, [("param", ParamRange("w", (9,), start, tensor[start:stop]))])
    with pytest.raises(CheckpointError, match="param/w: "):
        merge_parts(tmp_path, 2)


def test_an_overlap_is_refused_when_saving(tmp_path):
    for rank in range(2):
        write_rank(tmp_path, rank, [("param", ParamRange("w", (9,), 0, torch.zeros(9)))])
    with pytest.raises(
        CheckpointError, match="rank 1 owns elements 0..9, wanted a range that starts at 9"
    ):
        merge_parts(tmp_path, 2)


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(tmp_path):
    write(tmp_path, full_tensors(), 2, 0)
    reader = Reader(tmp_path)
    reader.check_shapes("param", SHAPES, set(SHAPES))
    other = {"a.weight": (7, 6), "b": (1,), "new": (2,)}
    with pytest.raises(CheckpointError) as caught:
        reader.check_shapes("param", other, set(other))
    message = str(caught.value)
    assert (
        "1 missing from the checkpoint: new" in message
        and "1 unknown to the model: c.bias" in message
    )
    assert "1 of another shape: a.weight (checkpoint (7, 5), model (7, 6))" in message
    with pytest.raises(
        CheckpointError, match="has no 'optimizer.exp_avg', only \\['ema', 'param'\\]"
    ):
        reader.check_shapes("optimizer.exp_avg", SHAPES, set(SHAPES))


def test_a_range_is_read_from_the_files_that_hold_it_alone(tmp_path):
    tensors = full_tensors()
    write(tmp_path, tensors, 3, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    start, stop, rank = index["param"]["a.weight"]["ranges"][0]
    for other in {0, 1, 2} - {rank}:
        (tmp_path / rank_file(other)).unlink()
    target = ParamRange("a.weight", SHAPES["a.weight"], start, torch.empty(stop - start))
    Reader(tmp_path).fill("param", target)
    assert torch.equal(target.tensor, tensors["param"]["a.weight"].view(-1)[start:stop])
