"""How an encode is cut into parts before it begins: the same parts for any number of processes, on
every start.

A part is a run of pictures of one unit: of a local tar, or of an image folder in an order drawn
once; a remote tar is one part. Process r of n takes parts r, r + n, r + 2n ...; nobody talks to
anybody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.offsets import key_hashes
from lpl_pretrain.encoding.classes import ClassTable
from lpl_pretrain.encoding.images import PIXELS_VERSION
from lpl_pretrain.encoding.pictures import Picture, Problem
from lpl_pretrain.encoding.sources import SourceUnit, list_units, no_pictures
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime import rng


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    """Part of its shards' names."""
    unit: SourceUnit
    first: int
    samples: int | None
    """None: all of the unit, which is not known yet (a remote tar)."""
    start: int = 0
    """Byte of a local tar where the first of them begins."""

    def items(self, fetch: Callable[[str], Path]) -> Iterator[Picture | Problem]:
        first = self.first if self.unit.files is not None else 0
        last = None if self.samples is None else first + self.samples
        return islice(self.unit.pictures(fetch, self.start), first, last)


@dataclass(frozen=True, slots=True)
class Plan:
    identity: str
    """Hash of all that the encoded bytes depend on: the listing of the source, the encoders, the
    configuration.
    """
    parts: list[Part]
    earlier_identity: str = ""
    """What versions before PIXELS_VERSION 2 called the same inputs."""
    readable: int = 0
    """Pictures of local sources that have all their members."""
    captioned: int = 0
    """Those of them that have a caption."""
    classes: list[str] | None = None
    """Names; None when there are remote tars."""

    @property
    def samples(self) -> int | None:
        """None when there are remote tars."""
        counts = [part.samples for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)


def make_plan(config: EncodeConfig, encoders: dict[str, str]) -> Plan:
    """Reads the headers of everything that is local.  `encoders`: identity of each network.  Raises
    DataError.

    Repeated keys and classes that contradict each other are found here, before anything is encoded;
    in remote tars, afterwards.
    """
    stamp, classes, hashes = _Stamp(config, encoders), ClassTable(), []
    parts: list[Part] = []
    readable = captioned = 0
    for number, unit in enumerate(list_units(config.source)):
        if unit.is_remote_tar:
            stamp.update(f"{unit.origin.rpartition('/')[2]} {unit.size}\n")
            parts.append(Part(f"{number:05d}-0000", unit, 0, None))
            continue
        unit = _shuffled(unit, config.seed)
        keys, starts = list[str](), list[int | None]()
        for item in unit.pictures():
            if isinstance(item, Problem):
                if config.on_error is OnError.STOP:
                    raise DataError(item.reason)
                keys.append(f"{unit.origin}\n{len(keys)}")  # holds a place, and is no key of a tar
                starts.append(None)
                continue
            stamp.update(item.stamp() + "\n")
            readable += 1
            captioned += bool(item.caption and item.caption.strip())
            classes.add(f"{item.origin}: sample {item.key!r}", item.label, item.class_name)
            keys.append(item.key)
            starts.append(item.start)
        if not keys:
            raise no_pictures(unit.origin)
        hashes.append(key_hashes(keys))
        parts += _cut(f"{number:05d}", unit, starts, config.shard_samples)
    names = classes.names()
    if hashes and (repeated := first_repeated(np.concatenate(hashes))) is not None:
        raise _repeated_key(config, repeated)
    is_local = all(part.samples is not None for part in parts)
    return Plan(
        stamp.identity(),
        parts,
        stamp.earlier_identity(),
        readable,
        captioned,
        names if is_local else None,
    )


def settings_of_bytes(config: EncodeConfig) -> dict[str, Any]:
    """What the encoded bytes depend on: all but where things lie (they are known by content) and
    what is done about damage.
    """
    return {**_configured(config), "pixels": PIXELS_VERSION}


class _Stamp:
    """Hashes of the configuration, the encoders and the listing, as this version and earlier ones
    make them.
    """

    def __init__(self, config: EncodeConfig, encoders: dict[str, str]) -> None:
        self._hashes = [hashlib.sha256(), hashlib.sha256()]
        for stamp, settings in zip(
            self._hashes, (settings_of_bytes(config), _configured(config)), strict=True
        ):
            stamp.update(f"{json.dumps(settings)} {sorted(encoders.items())}\n".encode())

    def update(self, text: str) -> None:
        for stamp in self._hashes:
            stamp.update(text.encode())

    def identity(self) -> str:
        return self._hashes[0].hexdigest()

    def earlier_identity(self) -> str:
        return self._hashes[1].hexdigest()


def _configured(config: EncodeConfig) -> dict[str, Any]:
    settings = config.model_dump(
        mode="json", exclude={"source", "output", "autoencoder", "on_error", "max_skipped_fraction"}
    )
    settings["text"] = {name: {**entry, "folder": ""} for name, entry in settings["text"].items()}
    return settings


def first_repeated(hashes: np.ndarray) -> int | None:
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(repeated[0]) if repeated.size else None


def _cut(name: str, unit: SourceUnit, starts: list[int | None], shard_samples: int) -> list[Part]:
    """Parts of nearly the same size, each of one full shard at most when there are no buckets.

    `starts`: where each picture begins; None for a problem, at which no part begins.
    """
    count = len(starts)
    parts = -(-count // shard_samples)
    ends = [0, *(count * i // parts for i in range(1, parts)), count]
    for i in range(1, parts):
        while ends[i] < count and starts[ends[i]] is None:
            ends[i] += 1
    spans = [(first, end) for first, end in zip(ends, ends[1:], strict=False) if first < end]
    return [
        Part(f"{name}-{i:04d}", unit, first, end - first, starts[first] or 0)
        for i, (first, end) in enumerate(spans)
    ]


def _shuffled(unit: SourceUnit, seed: int) -> SourceUnit:
    """An image folder comes class by class: its pictures are dealt to parts at random, so that
    every shard has all classes.
    """
    if unit.files is None:
        return unit
    return SourceUnit(
        unit.origin,
        tuple(sorted(unit.files, key=lambda p: (rng.key(seed, f"shard_of/{p.key}"), p.origin))),
        unit.size,
    )


def _repeated_key(config: EncodeConfig, wanted: int) -> DataError:
    """Reads the source again to name both."""
    found = [
        item
        for unit in list_units(config.source)
        if not unit.is_remote_tar
        for item in unit.pictures()
        if isinstance(item, Picture) and int(key_hashes([item.key])[0]) == wanted
    ]
    return DataError(
        f"{found[-1].origin}: key {found[-1].key!r} is there twice over all sources (also "
        f"{found[0].origin}), wanted unique keys: "
        "rename one"
    )
