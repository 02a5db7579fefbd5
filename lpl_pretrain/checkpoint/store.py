"""Files of a checkpoint: every rank writes the ranges that it owns, and any other layout can read
them.

    pieces_00000.safetensors   one file per rank: `<kind>/<parameter>` is the 1-D range that it owns
    index.json                 dtype, shape and ranges of each parameter by rank (index.py)
    state.json                 state of the trainer (state.py)
    manifest.json              sizes and hashes of the other files (manifest.py)

Kinds: `param` (master weights), `ema`, `ema_power_<sigma_rel>`, `optimizer.<state name>`.  Ranges
are in elements of the row-major flattened parameter and tile it.  Nothing is pickled, and no
function here is collective.
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
from lpl_pretrain.checkpoint.manifest import INDEX, FileRecord, Manifest, rank_file, write_json
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from lpl_pretrain.parallel.strategy import ParamRange
from lpl_pretrain.runtime.tensors import DTYPES, safetensors_blocks

MAX_LISTED_NAMES = 5


def part_file(rank: int) -> str:
    """Temporary file with a rank's part of the index."""
    return f"part_{rank:05d}.json"


def write_rank(folder: Path, rank: int, entries: Iterable[tuple[str, ParamRange]]) -> None:
    """Writes this rank's ranges, given as (kind, range), and its part of the index."""
    entries = list(entries)
    tensors = {f"{kind}/{owned.name}": owned.tensor.detach() for kind, owned in entries}
    assert len(tensors) == len(entries), "a rank owns one range of a parameter"
    record = _write_safetensors(folder / rank_file(rank), tensors)
    listing = [
        [kind, owned.name, DTYPES[owned.tensor.dtype], list(owned.shape), owned.start, owned.stop]
        for kind, owned in entries
    ]
    write_json(folder / part_file(rank), {"file": vars(record), "entries": listing})


def merge_parts(folder: Path, world_size: int) -> dict[str, FileRecord]:
    """Merges all ranks' parts into index.json; returns the files to list in the manifest.

    Raises CheckpointError if the ranges do not tile a parameter, which means that a strategy has
    misread the layout of its engine.
    """
    index: dict[str, dict[str, Any]] = {}
    files = {}
    for rank in range(world_size):
        part = json.loads((folder / part_file(rank)).read_text())
        files[rank_file(rank)] = FileRecord(**part["file"])
        for kind, name, dtype, shape, start, stop in part["entries"]:
            entry = index.setdefault(kind, {}).setdefault(
                name, {"dtype": dtype, "shape": shape, "ranges": []}
            )
            entry["ranges"].append([start, stop, rank])
    for kind, entries in index.items():
        for name, entry in entries.items():
            entry["ranges"].sort()
            if (problem := tiling_problem(entry["shape"], entry["ranges"])) is not None:
                raise CheckpointError(f"{kind}/{name}: {problem}")
    files[INDEX] = write_json(folder / INDEX, index)
    for rank in range(world_size):
        (folder / part_file(rank)).unlink()
    return files


class Reader:
    """Reads ranges of a checkpoint, and no other bytes of its files."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        """Raises DamagedCheckpointError for an invalid index; `manifest` bounds its values."""
        self.folder = folder
        self.index = Index.read(folder, manifest)
        self._files: dict[int, Any] = {}

    @property
    def entries(self) -> Entries:
        return self.index.entries

    def entries_of(self, kind: str) -> dict[str, dict[str, Any]]:
        """Entries of one kind by parameter name.  Raises CheckpointError."""
        if kind not in self.entries:
            raise CheckpointError(f"{self.folder}: has no {kind!r}, only {sorted(self.entries)}")
        return self.entries[kind]

    def check_shapes(self, kind: str, shapes: dict[str, tuple[int, ...]], needed: set[str]) -> None:
        """Raises CheckpointError unless `kind` holds the `needed` parameters, and only parameters
        that the model has in these `shapes`.
        """
        if kind not in self.entries:
            raise CheckpointError(
                f"{self.folder}: has no {kind!r}, only {sorted(self.entries)}: it was saved with "
                "another optimizer.kind; resume with that one, or start a new run directory"
            )
        saved = {name: tuple(entry["shape"]) for name, entry in self.entries[kind].items()}
        missing = [name for name in shapes if name in needed and name not in saved]
        unknown = [name for name in saved if name not in shapes]
        reshaped = [
            f"{name} (checkpoint {saved[name]}, model {shape})"
            for name, shape in shapes.items()
            if saved.get(name, shape) != shape
        ]
        problems = [
            _summarize("missing from the checkpoint", missing),
            _summarize("unknown to the model", unknown),
            _summarize("of another shape", reshaped),
        ]
        if any(problems):
            raise CheckpointError(
                f"{self.folder}: {kind} does not fit this model: "
                f"{'; '.join(filter(None, problems))}. Resume with the configuration that it was "
                "saved with, or start a new run directory"
            )

    @torch.no_grad()
    def fill(self, kind: str, target: ParamRange) -> None:
        """Overwrites the live tensor of `target` with the saved values, which may come from the
        files of several ranks.  Raises CheckpointError.
        """
        filled = 0
        for start, stop, rank in self._entry(kind, target.name)["ranges"]:
            first = max(start, target.start)
            last = min(stop, target.stop)
            if first < last:
                saved = self._read_slice(rank, f"{kind}/{target.name}", first - start, last - start)
                target.tensor[first - target.start : last - target.start].copy_(saved)
                filled += last - first
        if filled != target.tensor.numel():
            raise CheckpointError(
                f"{self.folder}: {kind}/{target.name} holds {filled} of elements "
                f"{target.start}..{target.stop}"
            )

    def iter_full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full tensor) of the parameters of one kind.  Raises CheckpointError."""
        for name in self.entries_of(kind):
            yield name, self.read_full(kind, name)

    def read_full(self, kind: str, name: str) -> Tensor:
        """Reads one parameter, joined from its ranges.  Raises CheckpointError."""
        entry = self._entry(kind, name)
        dtype = next(key for key, value in DTYPES.items() if value == entry["dtype"])
        tensor = torch.empty(entry["shape"], dtype=dtype)
        self.fill(kind, ParamRange(name, tuple(entry["shape"]), 0, tensor.view(-1)))
        return tensor

    def _entry(self, kind: str, name: str) -> dict[str, Any]:
        if (entry := self.entries_of(kind).get(name)) is None:
            raise CheckpointError(f"{self.folder}: has no {kind}/{name}")
        return entry

    def _read_slice(self, rank: int, key: str, first: int, last: int) -> Tensor:
        """Reads elements [first, last) of the tensor `key` in the file of `rank`."""
        try:
            return self._file(rank).get_slice(key)[first:last]
        except (OSError, SafetensorError) as error:
            path = self.folder / rank_file(rank)
            raise DamagedCheckpointError(f"{path}: {key} cannot be read: {error}") from None

    def _file(self, rank: int) -> Any:
        """Opens the file of a rank, after its header was compared with the index."""
        if rank not in self._files:
            self.index.check_header(rank)
            self._files[rank] = safe_open(self.folder / rank_file(rank), framework="pt")
        return self._files[rank]


def load_full(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """Reads the full tensors of one kind to the CPU, without a strategy.

    Checks the structure but not the hashes; a checkpoint that a user names is read with verify.py.
    """
    return dict(Reader(folder).iter_full(kind))


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    """Writes, hashes and syncs a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for block in safetensors_blocks(tensors):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _summarize(what: str, names: list[str]) -> str:
    """Number and first names of parameters with a problem; "" if there are none."""
    if not names:
        return ""
    num_more = len(names) - MAX_LISTED_NAMES
    more = f" and {num_more} more" if num_more > 0 else ""
    return f"{len(names)} {what}: {', '.join(names[:MAX_LISTED_NAMES])}{more}"
