"""The files of a checkpoint: every rank writes the ranges it owns, and any range can be read back
by any other layout.

    pieces_00000.safetensors   one file a rank; tensor `<kind>/<parameter>` is the 1-D range which that rank owns
    index.json                 {kind: {parameter: {dtype, shape, ranges: [[start, stop, rank], ...]}}}
    state.json                 what the trainer wants to find again
    manifest.json              see manifest.py

Kinds: `param` (masters), `ema`, `ema_power_<sigma_rel>`, `optimizer.<state name>`.  Ranges are in
elements of the row-major flattened parameter and tile it. Nothing is pickled; nothing here
communicates.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpl_pretrain.checkpoint.index import Entries, Index, tiling_problem
from lpl_pretrain.checkpoint.manifest import INDEX, FileRecord, Manifest, pieces_file, write_json
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from lpl_pretrain.parallel.strategy import ParamRange
from lpl_pretrain.runtime.tensors import DTYPES, safetensors_blocks

LISTED = 5


def part_file(rank: int) -> str:
    return f"part_{rank:05d}.json"


def write_rank(folder: Path, rank: int, entries: Iterable[tuple[str, ParamRange]]) -> None:
    """This rank's pieces, given as (kind, piece), and the part of the index that tells of them."""
    entries = list(entries)
    tensors = {f"{kind}/{piece.name}": piece.tensor.detach() for kind, piece in entries}
    assert len(tensors) == len(entries), "a rank owns one range of a parameter"
    record = _write_safetensors(folder / pieces_file(rank), tensors)
    listing = [
        [kind, p.name, DTYPES[p.tensor.dtype], list(p.shape), p.start, p.stop]
        for kind, p in entries
    ]
    write_json(folder / part_file(rank), {"file": vars(record), "entries": listing})


def merge_parts(folder: Path, world_size: int) -> dict[str, FileRecord]:
    """Turn all ranks' parts into index.json; returns the files to list in the manifest."""
    index: dict[str, dict[str, Any]] = {}
    files = {}
    for rank in range(world_size):
        part = json.loads((folder / part_file(rank)).read_text())
        files[pieces_file(rank)] = FileRecord(**part["file"])
        for kind, name, dtype, shape, start, stop in part["entries"]:
            entry = index.setdefault(kind, {}).setdefault(
                name, {"dtype": dtype, "shape": shape, "ranges": []}
            )
            entry["ranges"].append([start, stop, rank])
    for kind, entries in index.items():
        for name, entry in entries.items():
            entry["ranges"].sort()
            if (problem := tiling_problem(entry["shape"], entry["ranges"])) is not None:
                raise CheckpointError(
                    f"{kind}/{name}: {problem}"
                )  # a strategy has misread its engine
    files[INDEX] = write_json(folder / INDEX, index)
    for rank in range(world_size):
        (folder / part_file(rank)).unlink()
    return files


class Reader:
    """Reads ranges of a checkpoint, touching only the bytes asked for."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        """Raises DamagedCheckpointError for an index that cannot be right; `manifest` bounds it."""
        self.folder = folder
        self.index = Index.read(folder, manifest)
        self._files: dict[int, Any] = {}

    @property
    def entries(self) -> Entries:
        return self.index.entries

    def named(self, kind: str) -> dict[str, dict[str, Any]]:
        """Entries of one kind by parameter.  Raises CheckpointError."""
        if kind not in self.entries:
            raise CheckpointError(f"{self.folder}: has no {kind!r}, only {sorted(self.entries)}")
        return self.entries[kind]

    def check(self, kind: str, shapes: dict[str, tuple[int, ...]], wanted: set[str]) -> None:
        """CheckpointError unless `kind` covers the `wanted` parameters, and none that are not of
        these shapes.
        """
        if kind not in self.entries:
            raise CheckpointError(
                f"{self.folder}: has no {kind!r}, only {sorted(self.entries)}: it was saved "
                "with another "
                "optimizer.kind; resume with that one, or start a new run directory"
            )
        saved = {name: tuple(entry["shape"]) for name, entry in self.entries[kind].items()}
        reshaped = [name for name in shapes if saved.get(name, shapes[name]) != shapes[name]]
        complaints = [
            _list(
                "missing from the checkpoint",
                [name for name in shapes if name in wanted and name not in saved],
            ),
            _list("unknown to the model", [name for name in saved if name not in shapes]),
            _list(
                "of another shape",
                [f"{name} (checkpoint {saved[name]}, model {shapes[name]})" for name in reshaped],
            ),
        ]
        if any(complaints):
            raise CheckpointError(
                f"{self.folder}: {kind} does not fit this model: "
                f"{'; '.join(filter(None, complaints))}. "
                "Resume with the configuration that it was saved with, or start a new run directory"
            )

    @torch.no_grad()
    def fill(self, kind: str, piece: ParamRange) -> None:
        """Overwrite the live tensor of `piece`, from however many ranks' ranges it takes."""
        filled = 0
        for start, stop, rank in self._entry(kind, piece.name)["ranges"]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                key = f"{kind}/{piece.name}"
                try:
                    saved = self._file(rank).get_slice(key)[first - start : last - start]
                except (OSError, SafetensorError) as error:
                    path = self.folder / pieces_file(rank)
                    raise DamagedCheckpointError(f"{path}: {key} cannot be read: {error}") from None
                piece.tensor[first - piece.start : last - piece.start].copy_(saved)
                filled += last - first
        if filled != piece.tensor.numel():
            raise CheckpointError(
                f"{self.folder}: {kind}/{piece.name} holds {filled} of elements "
                f"{piece.start}..{piece.stop}"
            )

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(parameter, whole tensor) of one kind.  Raises CheckpointError."""
        for name in self.named(kind):
            yield name, self.whole(kind, name)

    def whole(self, kind: str, name: str) -> Tensor:
        """One parameter, joined from its ranges.  Raises CheckpointError."""
        entry = self._entry(kind, name)
        dtype = next(key for key, value in DTYPES.items() if value == entry["dtype"])
        tensor = torch.empty(entry["shape"], dtype=dtype)
        self.fill(kind, ParamRange(name, tuple(entry["shape"]), 0, tensor.view(-1)))
        return tensor

    def _entry(self, kind: str, name: str) -> dict[str, Any]:
        if (entry := self.named(kind).get(name)) is None:
            raise CheckpointError(f"{self.folder}: has no {kind}/{name}")
        return entry

    def _file(self, rank: int) -> Any:
        """The open file of a rank, whose header agrees with the index."""
        if rank not in self._files:
            self.index.check_header(rank)
            self._files[rank] = safe_open(self.folder / pieces_file(rank), framework="pt")
        return self._files[rank]


def read_full(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """Whole tensors on CPU, on one process and without any strategy.

    Structure is checked, content is not: what a user names is read through verify.py.
    """
    return dict(Reader(folder).full(kind))


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    """Hashed while written, and written through to the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in safetensors_blocks(tensors):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"
