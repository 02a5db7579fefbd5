"""Ranges written by any number of ranks are read back into any other layout; the files are plain
safetensors.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from lpl_pretrain.checkpoint.store import Reader, merge_parts, pieces_file, read_full, write_rank
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.parallel.strategy import ParamRange

SHAPES = {"a.weight": (7, 5), "b": (1,), "c.bias": (3, 2, 4)}
KINDS = ("param", "ema")


def whole() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in KINDS
    }


def cut(numel: int, ranks: int, seed: int) -> list[tuple[int, int]]:
    """Random contiguous shares, some of them empty."""
    inner = sorted(random.Random(seed).choices(range(numel + 1), k=ranks - 1))
    return list(zip([0, *inner], [*inner, numel], strict=True))


def owned(tensors, rank: int, ranks: int, seed: int) -> list[tuple[str, ParamRange]]:
    found = []
    for kind in KINDS:
        for number, (name, tensor) in enumerate(tensors[kind].items()):
            start, stop = cut(tensor.numel(), ranks, seed + number)[rank]
            if start < stop:
                found.append(
                    (kind, ParamRange(name, SHAPES[name], start, tensor.view(-1)[start:stop]))
                )
    return found


def write(folder, tensors, ranks: int, seed: int):
    for rank in range(ranks):
        write_rank(folder, rank, owned(tensors, rank, ranks, seed))
    return merge_parts(folder, ranks)


@pytest.mark.parametrize(
    "ranks, readers, seed", [(1, 1, 0), (3, 1, 1), (2, 5, 2), (5, 2, 3), (4, 4, 4)]
)
def test_any_layout_into_any_layout(tmp_path, ranks, readers, seed):
    tensors = whole()
    files = write(tmp_path, tensors, ranks, seed)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert all(
        (tmp_path / name).stat().st_size == f.bytes and file_sha256(tmp_path / name) == f.sha256
        for name, f in files.items()
    )
    for kind in KINDS:
        assert all(
            torch.equal(tensor, tensors[kind][name])
            for name, tensor in read_full(tmp_path, kind).items()
        )
    empty = {
        kind: {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
        for kind in KINDS
    }
    for rank in range(readers):
        reader = Reader(tmp_path)
        for kind, piece in owned(empty, rank, readers, seed + 100):
            reader.fill(kind, piece)
    assert all(
        torch.equal(empty[kind][name], tensors[kind][name]) for kind in KINDS for name in SHAPES
    )


def test_files_are_plain_safetensors(tmp_path):
    tensors = whole()
    write(tmp_path, tensors, 1, 0)
    loaded = load_file(tmp_path / pieces_file(0))
    assert torch.equal(loaded["ema/a.weight"], tensors["ema"]["a.weight"].view(-1)) and len(
        loaded
    ) == len(SHAPES) * len(KINDS)


@pytest.mark.parametrize("lost", ["first", "middle", "last"])
def test_a_gap_is_refused_when_saving(tmp_path, lost):
    """Ranges that do not tile mean that a strategy has misread its engine: better no checkpoint
    than one with holes.
    """
    tensor = torch.zeros(9)
    ranges = [(0, 3), (3, 6), (6, 9)]
    del ranges[["first", "middle", "last"].index(lost)]
    for rank, (start, stop) in enumerate(ranges):
        write_rank(tmp_path, rank, [("param", ParamRange("w", (9,), start, tensor[start:stop]))])
    with pytest.raises(CheckpointError, match="param/w: "):
        merge_parts(tmp_path, 2)


def test_an_overlap_is_refused_too(tmp_path):
    for rank in range(2):
        write_rank(tmp_path, rank, [("param", ParamRange("w", (9,), 0, torch.zeros(9)))])
    with pytest.raises(
        CheckpointError, match="rank 1 owns elements 0..9, wanted a range that starts at 9"
    ):
        merge_parts(tmp_path, 2)


def test_another_model_is_refused_with_all_differences(tmp_path):
    write(tmp_path, whole(), 2, 0)
    reader = Reader(tmp_path)
    reader.check("param", SHAPES, set(SHAPES))
    with pytest.raises(CheckpointError) as caught:
        reader.check("param", other := {"a.weight": (7, 6), "b": (1,), "new": (2,)}, set(other))
    message = str(caught.value)
    assert (
        "1 missing from the checkpoint: new" in message
        and "1 unknown to the model: c.bias" in message
    )
    assert "1 of another shape: a.weight (checkpoint (7, 5), model (7, 6))" in message
    with pytest.raises(
        CheckpointError, match="has no 'optimizer.exp_avg', only \\['ema', 'param'\\]"
    ):
        reader.check("optimizer.exp_avg", SHAPES, set(SHAPES))


def test_reading_touches_only_the_files_it_needs(tmp_path):
    tensors = whole()
    write(tmp_path, tensors, 3, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    start, stop, rank = index["param"]["a.weight"]["ranges"][0]
    for other in {0, 1, 2} - {rank}:
        (tmp_path / pieces_file(other)).unlink()
    piece = ParamRange("a.weight", SHAPES["a.weight"], start, torch.empty(stop - start))
    Reader(tmp_path).fill("param", piece)
    assert torch.equal(piece.tensor, tensors["param"]["a.weight"].view(-1)[start:stop])
