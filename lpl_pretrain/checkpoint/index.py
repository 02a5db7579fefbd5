"""Schema of index.json, which says in which rank's file each range of a parameter is, and of the
headers of these files.

    {kind: {parameter: {dtype, shape, ranges: [[start, stop, rank], ...]}}}

Ranges are in elements of the row-major flattened parameter, ascending, and tile it exactly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpl_pretrain.checkpoint.manifest import INDEX, Manifest, rank_file, regular_file
from lpl_pretrain.config.strict_json import (
    JSONError,
    is_count,
    key_problem,
    parse_json,
    read_json,
    shown,
)
from lpl_pretrain.errors import DamagedCheckpointError

ELEMENT_BYTES = {"F32": 4, "F64": 8}
KIND = re.compile(r"[A-Za-z0-9_.]{1,100}")
LIMIT_BYTES = 4 << 30
HEADER_LIMIT_BYTES = 100_000_000
"""Limit of the safetensors library."""
ENTRY_KEYS = frozenset({"dtype", "shape", "ranges"})
HEADER_KEYS = frozenset({"dtype", "shape", "data_offsets"})
Entries = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Index:
    """A checked index.json."""

    folder: Path
    entries: Entries
    tensors: dict[int, int] = field(default_factory=dict)
    """Rank -> number of ranges in its file."""
    data_bytes: dict[int, int] = field(default_factory=dict)
    """Rank -> number of bytes of these ranges."""

    @classmethod
    def read(cls, folder: Path, manifest: Manifest | None = None) -> Index:
        """Reads and checks index.json.  Raises DamagedCheckpointError.

        `manifest` bounds the ranks and the bytes in the file of each.
        """
        path = folder / INDEX
        try:
            entries = read_json(regular_file(path), limit_bytes=LIMIT_BYTES)
        except JSONError as error:
            raise DamagedCheckpointError(str(error)) from None
        index = cls(folder, entries)
        if (problem := index._problem()) is None and manifest is not None:
            problem = index._disagreement(manifest)
        if problem is not None:
            raise DamagedCheckpointError(f"{path}: {problem}")
        return index

    def check_header(self, rank: int) -> None:
        """Raises DamagedCheckpointError unless the file of `rank` holds exactly the ranges that the
        index lists for it.
        """
        path = self.folder / rank_file(rank)
        header = read_header(path)
        for key, (dtype, elements) in header.items():
            kind, _, name = key.partition("/")
            entry = self.entries.get(kind, {}).get(name)
            ranges = [] if entry is None else [r for r in entry["ranges"] if r[2] == rank]
            if entry is None or not ranges:
                raise DamagedCheckpointError(
                    f"{path}: holds {shown(key)}, which {INDEX} does not expect there"
                )
            start, stop, _ = ranges[0]
            if (dtype, elements) != (entry["dtype"], stop - start):
                raise DamagedCheckpointError(
                    f"{path}: {shown(key)} has {elements} elements of {dtype}, {INDEX} says "
                    f"{stop - start} of {entry['dtype']}"
                )
        if len(header) != self.tensors.get(rank, 0):
            raise DamagedCheckpointError(
                f"{path}: holds {len(header)} tensors, {INDEX} says {self.tensors.get(rank, 0)}"
            )

    def _problem(self) -> str | None:
        """Describes the first invalid entry, if any; also fills `tensors` and `data_bytes`."""
        if not isinstance(self.entries, dict):
            return f"found {shown(self.entries)}, wanted an object"
        shapes: dict[str, list[int]] = {}
        for kind, named in self.entries.items():
            if not KIND.fullmatch(kind) or not isinstance(named, dict) or not named:
                return (
                    f"{shown(kind)}: found {shown(named)}, wanted a kind of tensors and its "
                    "parameters"
                )
            for name, entry in named.items():
                problem = _entry_problem(entry)
                if problem is None and shapes.setdefault(name, entry["shape"]) != entry["shape"]:
                    problem = (
                        f"shape {shown(entry['shape'])}, another kind has {shown(shapes[name])}"
                    )
                if problem is not None:
                    return f"{kind}/{shown(name)}: {problem}"
                self._count(entry)
        return None

    def _count(self, entry: dict[str, Any]) -> None:
        """Adds the ranges of one parameter to `tensors` and `data_bytes`."""
        element_bytes = ELEMENT_BYTES[entry["dtype"]]
        for start, stop, rank in entry["ranges"]:
            range_bytes = (stop - start) * element_bytes
            self.tensors[rank] = self.tensors.get(rank, 0) + 1
            self.data_bytes[rank] = self.data_bytes.get(rank, 0) + range_bytes

    def _disagreement(self, manifest: Manifest) -> str | None:
        """Describes a contradiction to the manifest, if any."""
        for rank, num_bytes in self.data_bytes.items():
            if rank >= manifest.world_size:
                return f"names rank {rank}, the manifest says world_size={manifest.world_size}"
            file_bytes = manifest.files[rank_file(rank)].bytes
            if num_bytes > file_bytes:
                return (
                    f"rank {rank} should hold {num_bytes} bytes, {rank_file(rank)} has {file_bytes}"
                )
        return None


def tiling_problem(shape: list[int], ranges: list[list[int]]) -> str | None:
    """Explains why ascending ranges do not cover a parameter of this shape exactly once, if so."""
    expected = 0
    ranks = set()
    for start, stop, rank in ranges:
        if start != expected:
            return (
                f"rank {rank} owns elements {start}..{stop}, wanted a range that starts at "
                f"{expected}"
            )
        if stop <= start:
            return f"rank {rank} owns elements {start}..{stop}, wanted at least one"
        if rank in ranks:
            return f"rank {rank} owns two ranges"
        ranks.add(rank)
        expected = stop
    if expected != math.prod(shape):
        return f"ranks own {expected} elements of {math.prod(shape)}"
    return None


def read_header(path: Path) -> dict[str, tuple[str, int]]:
    """Reads (dtype, number of elements) of every 1-D tensor in a safetensors file.

    Raises DamagedCheckpointError.
    """
    size = regular_file(path).stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, HEADER_LIMIT_BYTES):
                raise DamagedCheckpointError(
                    f"{path}: is no safetensors file: {size} bytes, a header of {length}"
                )
            content = parse_json(file.read(length), f"{path}: header")
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {error.strerror or error}") from None
    except JSONError as error:
        raise DamagedCheckpointError(str(error)) from None
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path}: header: found {shown(content)}, wanted an object")
    header = {}
    expected = 0
    for key, entry in content.items():
        if (problem := _header_problem(entry, expected)) is not None:
            raise DamagedCheckpointError(f"{path}: header: {shown(key)}: {problem}")
        header[key] = (entry["dtype"], entry["shape"][0])
        expected = entry["data_offsets"][1]
    if expected != size - 8 - length:
        raise DamagedCheckpointError(
            f"{path}: {size - 8 - length} bytes of data, the header says {expected}"
        )
    return header


def _entry_problem(entry: Any) -> str | None:
    if (problem := key_problem(entry, ENTRY_KEYS)) is not None:
        return problem
    dtype, shape, ranges = entry["dtype"], entry["shape"], entry["ranges"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        return f"dtype: found {shown(dtype)}, wanted one of {', '.join(ELEMENT_BYTES)}"
    if not isinstance(shape, list) or not all(is_count(size) and size > 0 for size in shape):
        return f"shape: found {shown(shape)}, wanted positive integers"
    if not isinstance(ranges, list) or not all(map(_is_range, ranges)):
        return f"ranges: found {shown(ranges)}, wanted [start, stop, rank] of integers from 0"
    return tiling_problem(shape, ranges)


def _is_range(entry: Any) -> bool:
    if type(entry) is not list or len(entry) != 3:
        return False
    start, stop, rank = entry  # no loop over them: there may be millions of entries
    return (
        type(start) is int
        and type(stop) is int
        and type(rank) is int
        and start >= 0
        and stop >= 0
        and rank >= 0
    )


def _header_problem(entry: Any, expected: int) -> str | None:
    if (problem := key_problem(entry, HEADER_KEYS)) is not None:
        return problem
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        return f"dtype {shown(dtype)}, wanted one of {', '.join(ELEMENT_BYTES)}"
    if not (isinstance(shape, list) and len(shape) == 1 and is_count(shape[0])):
        return f"shape {shown(shape)}, wanted one length"
    wanted = [expected, expected + shape[0] * ELEMENT_BYTES[dtype]]
    if offsets != wanted:
        return f"data_offsets {shown(offsets)}, wanted {wanted}"
    return None
