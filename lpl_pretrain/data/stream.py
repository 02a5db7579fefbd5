"""Latents by global sample count: any batch, at any point of training, without state.

The trainer decides who asks for which counts; the stream knows neither ranks nor steps, so resuming
is asking for the next counts. A sample that cannot be read stops the run, or, when the
configuration says so, another one stands in for it: the same one on every layout, drawn from the
same pool by (seed, count).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lpl_pretrain.config.check import data_problems
from lpl_pretrain.config.data_mixture import DataFolders, read_data
from lpl_pretrain.config.dataset import ShardEntry, contents_of
from lpl_pretrain.config.paths import is_url
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.data.bad_samples import BadSampleLog
from lpl_pretrain.data.batch import LatentBatch, TextBatch, on_device
from lpl_pretrain.data.cache import CachedStore, LocalStore, Store
from lpl_pretrain.data.format import DTYPES, EncodedText
from lpl_pretrain.data.offsets import SUFFIX
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.data.prefetch import prefetch_map
from lpl_pretrain.data.shard import Damage, OpenShard, check_size
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.log import log

BATCHES_AHEAD = 4
MOST_OPEN_SHARDS = 768
"""Below the usual limit of 1,024 open files."""
SUBSTITUTES = 100
"""Samples that are tried in the place of an unreadable one."""
INFINITY = {"fp16": 0x7C00, "bf16": 0x7F80}
"""The bits of infinity; those of NaN are above, those of finite magnitudes below."""
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Wants:
    """What a run reads besides latents, labels and sizes."""

    captions: bool = False
    text: tuple[str, ...] = ()
    """Names of text encoders."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample, without its latent."""

    label: int
    micro: np.ndarray  # (6,) as in data/offsets.py
    caption: str | None
    text: dict[str, EncodedText]
    place: tuple[int, int, int]


class LatentStream:
    """One or several finished folders, opened for reading.  Raises DataError that names shard and
    key.
    """

    def __init__(
        self, config: DataConfig, seed: int, global_batch_size: int, wants: Wants | None = None
    ) -> None:
        self.config, self.seed, self.wants = config, seed, wants or Wants()
        self.folders = read_data(config.folder)
        self.index = self.folders.merged
        warn_without_digests(self.folders)
        if problems := data_problems(config, self.index, self.wants.text):
            raise ConfigError("\n".join(problems))
        self.order = SampleOrder(
            self.folders,
            seed,
            global_batch_size,
            lanes=config.lanes,
            block_samples=config.block_samples,
        )
        at_once = [self.order.shards_at_once(folder) for folder in range(len(self.folders.paths))]
        self._most_open = min(2 * sum(at_once), MOST_OPEN_SHARDS)
        self._stores = [
            self._store(path, i, at_once[i]) for i, path in enumerate(self.folders.paths)
        ]
        self._open: dict[tuple[int, int], OpenShard] = {}
        self._lock = threading.Lock()
        self.damage = BadSampleLog(config, self.folders.indexes)
        self._fetched_to = 0
        self._check_sizes()

    def close(self) -> None:
        """Nothing is fetched ahead from here on; what is on its way is waited for."""
        for store in self._stores:
            store.close()
        with self._lock:
            self._open.clear()

    def name(self, place: tuple[int, int, int]) -> str:
        """How messages call a stored sample."""
        folder, shard, row = place
        file = self.folders.indexes[folder].shards[shard].file
        inside = f"{self.folders.paths[folder]}/" if len(self.folders.paths) > 1 else ""
        return f"{inside}{file} row {row}"

    def state(self, samples_seen: int, jumped: int = 0) -> dict:
        """Where in the data a run is, once it has seen so many samples: JSON, the same on every
        rank.

        `jumped`: samples that it passed without seeing them.
        """
        return {
            "samples_seen": samples_seen,
            "epoch": (samples_seen + jumped) // self.index.samples,
            "seed": self.seed,
            "fingerprint": self.index.fingerprint,
            "contents": contents_of(self.index),
        }

    def read(self, sample_indices: Sequence[int]) -> LatentBatch:
        """One row per global sample count, in the order given; all of them of one bucket."""
        counts = np.asarray(sample_indices, dtype=np.int64)
        found = self.order.locate(counts)
        self._fetch_ahead(counts)
        places = list(
            zip(found.folder.tolist(), found.shard.tolist(), found.row.tolist(), strict=True)
        )
        flips = self._flips(counts)
        buckets = {self._bucket(folder, shard) for folder, shard in {place[:2] for place in places}}
        assert len(buckets) <= 1, (
            f"samples {sample_indices} are of different global batches, in buckets "
            f"{sorted(buckets)}"
        )
        height, width = next(iter(buckets), (self.index.latent.height, self.index.latent.width))
        stored = np.empty(
            (len(places), 2 * self.index.latent.channels, height, width),
            dtype=DTYPES[self.index.moments_dtype],
        )
        raw = stored.reshape(len(places), -1).view(np.uint8)
        rows = [
            self._read_row(*row)
            for row in zip(counts.tolist(), places, flips.tolist(), raw, strict=True)
        ]
        for row in np.flatnonzero(self._not_finite(raw)).tolist():
            rows[row] = self._read_row(
                int(counts[row]), places[row], bool(flips[row]), raw[row], look=True
            )
        return self._collate(stored, rows, flips, counts)

    def prefetch(
        self, requests: Iterable[Sequence[int]], device: torch.device | None = None
    ) -> Generator[LatentBatch, None, None]:
        """`read` of each request, ahead of the consumer on `workers` threads; brought to `device`,
        through pinned memory if CUDA.

        `requests` is consumed a few batches early; closing the iterator joins the threads.
        """
        pin = device is not None and device.type == "cuda"
        batches = prefetch_map(
            lambda request: self.read(request).pin_memory() if pin else self.read(request),
            requests,
            threads=self.config.workers,
            ahead=max(BATCHES_AHEAD, 2 * self.config.workers),
        )
        return batches if device is None else on_device(batches, device)

    def verify(self, *, share: int = 0, shares: int = 1) -> list[tuple[int, int, int | None, str]]:
        """Reads every byte of every `shares`-th shard and compares checksums: (folder, shard, row
        or None, reason) of damage.

        Raises DataError for the first when the configuration says `stop`.
        """
        damaged = []
        shards = [
            (folder, shard)
            for folder, index in enumerate(self.folders.indexes)
            for shard in range(len(index.shards))
        ]
        for folder, shard in shards[share::shares]:
            if self.damage.reason(folder, shard, None):
                continue
            try:
                problems = self._shard(folder, shard).verify()
            except DataError as problem:
                problems = [Damage(None, str(problem))]
            if problems and self.damage.stops:
                raise DataError(problems[0].reason)
            damaged += [(folder, shard, problem.row, problem.reason) for problem in problems]
        return damaged

    def _read_row(
        self,
        count: int,
        place: tuple[int, int, int],
        flipped: bool,
        into: np.ndarray,
        look: bool = False,
    ) -> Row:
        """What was read: the sample at `place`, or another of its pool when that is damaged and may
        be skipped.

        `look` into the latent for NaN and infinity; without, the whole batch is looked at
        afterwards, which is faster.
        """
        folder, shard, row = place
        for substitute in range(SUBSTITUTES):
            try:
                return self._try_row(folder, shard, row, flipped, into, look)
            except DataError as problem:
                self.damage.note(folder, shard, row, str(problem))
            folder, shard, row = self.order.substitute_location(
                place, rng.key(self.seed, "substitute", count, substitute)
            )
        raise DataError(
            f"{self.folders.paths[folder]}: {SUBSTITUTES} samples in a row cannot be read: encode "
            "the folder again"
        )

    def _try_row(
        self, folder: int, shard: int, row: int, flipped: bool, into: np.ndarray, look: bool
    ) -> Row:
        if known := self.damage.reason(folder, shard, row):
            raise DataError(known)
        opened = self._shard(folder, shard)
        opened.read_moments(row, flipped, memoryview(into))  # type: ignore[arg-type]
        if look and self._not_finite(into[None])[0]:
            raise DataError(
                f"{opened.where(row)}: NaN or infinity in its latent, wanted finite values: encode "
                "the folder again"
            )
        caption = opened.read_caption(row) if self.wants.captions else None
        text = {
            name: opened.read_text(row, name, self.index.text[name]) for name in self.wants.text
        }
        return Row(
            int(opened.offsets.label[row]),
            opened.offsets.micro[row],
            caption,
            text,
            (folder, shard, row),
        )

    def _not_finite(self, raw: np.ndarray) -> np.ndarray:
        """(B, bytes) of latents as stored -> (B,) bool"""
        magnitudes = raw.view("<i2") & 0x7FFF
        return magnitudes.max(axis=1, initial=0) >= INFINITY[self.index.moments_dtype]

    def _flips(self, counts: np.ndarray) -> np.ndarray:
        if not self.config.flips:
            return np.zeros(len(counts), dtype=bool)
        return (rng.uniform(self.seed, "flip", counts.tolist()) < 0.5).numpy()

    def _collate(
        self, stored: np.ndarray, rows: list[Row], flips: np.ndarray, counts: np.ndarray
    ) -> LatentBatch:
        dtype = torch.float16 if self.index.moments_dtype == "fp16" else torch.bfloat16
        return LatentBatch(
            torch.from_numpy(stored.view("<i2")).view(dtype),
            torch.tensor([row.label for row in rows], dtype=torch.int64),
            torch.from_numpy(counts),
            self._sizes(rows, flips, stored.shape[2:]),
            [row.caption or "" for row in rows] if self.wants.captions else None,
            {
                name: _text_batch([row.text[name] for row in rows], self.index.text[name].width)
                for name in self.wants.text
            },
            [row.place for row in rows],
        )

    def _sizes(self, rows: list[Row], flips: np.ndarray, latent: tuple[int, ...]) -> torch.Tensor:
        micro = np.array([row.micro for row in rows], dtype=np.int64).reshape(-1, 3, 2)
        source, resized, crop = micro[:, 0], micro[:, 1], micro[:, 2]
        target = np.array(latent, dtype=np.int64) * self.index.autoencoder.downscale
        mirrored = flips & (crop[:, 1] >= 0)
        crop[mirrored, 1] = resized[mirrored, 1] - target[1] - crop[mirrored, 1]
        return torch.from_numpy(
            np.concatenate([source, crop, np.broadcast_to(target, source.shape)], axis=1)
        )

    def _bucket(self, folder: int, shard: int) -> tuple[int, int]:
        index = self.folders.indexes[folder]
        bucket = index.buckets[index.shards[shard].bucket]
        return bucket.height, bucket.width

    def _shard(self, folder: int, shard: int) -> OpenShard:
        if known := self._open.get((folder, shard)):
            return known
        index = self.folders.indexes[folder]
        entry = index.shards[shard]
        try:
            tar, offsets = (self._stores[folder].path(*file) for file in _files(entry))
            opened = OpenShard(tar, offsets, entry, index)
        except DataError as problem:
            self.damage.note(folder, shard, None, str(problem))
            raise
        with self._lock:
            self._open[folder, shard] = opened
            if len(self._open) > self._most_open:
                del self._open[
                    next(iter(self._open))
                ]  # the one opened first; closed once nobody reads it
        return opened

    def _fetch_ahead(self, counts: np.ndarray) -> None:
        """Remote shards that will be read before every lane has moved on by a block are asked for
        now.
        """
        horizon, lanes = self.config.lanes * self.config.block_samples, self.config.lanes
        now = int(counts.max(initial=0))
        if (
            not any(isinstance(store, CachedStore) for store in self._stores)
            or now + horizon * 3 // 4 < self._fetched_to
        ):
            return
        self._fetched_to = now + horizon
        coming = self.order.locate(
            (
                now + np.arange(0, horizon + 1, max(1, horizon // 4))[:, None] + np.arange(lanes)
            ).ravel()
        )
        for folder, shard in dict.fromkeys(
            zip(coming.folder.tolist(), coming.shard.tolist(), strict=True)
        ):
            for file in _files(self.folders.indexes[folder].shards[shard]):
                self._stores[folder].ahead(*file)

    def _store(self, path: str, folder: int, at_once: int) -> Store:
        if not is_url(path):
            return LocalStore(path)
        largest = max(entry.bytes for entry in self.folders.indexes[folder].shards)
        return CachedStore(path, self.config.cache, largest_bytes=largest, at_once=at_once)

    def _check_sizes(self) -> None:
        for folder, (store, index) in enumerate(
            zip(self._stores, self.folders.indexes, strict=True)
        ):
            for shard, entry in enumerate(index.shards):
                if isinstance(store, LocalStore):
                    try:
                        check_size(store.folder / entry.file, entry)
                    except DataError as problem:
                        self.damage.note(folder, shard, None, str(problem))


def warn_without_digests(folders: DataFolders) -> None:
    """Logs one line, once in a process, for each folder of format 2."""
    for path, index in zip(folders.paths, folders.indexes, strict=True):
        if index.format_version < 3 and path not in _warned:
            _warned.add(path)
            log.warning(
                "%s: format 2: its index.json and null text have no checksums, so damage to them "
                "goes unnoticed; "
                "`lpl-pretrain data seal %s` checks the folder and adds them (runs on it go on)",
                path,
                path,
            )


def _text_batch(found: list[EncodedText], width: int) -> TextBatch:
    lengths = [len(text.tokens) for text in found]
    states = np.zeros((len(found), max(lengths, default=0), width), dtype=np.float16)
    for i, text in enumerate(found):
        states[i, : lengths[i]] = text.floats()
    pooled = [text.pooled for text in found if text.pooled is not None]
    return TextBatch(
        torch.from_numpy(states),
        torch.tensor(lengths),
        torch.from_numpy(np.stack(pooled)) if pooled else None,
    )


def _files(entry: ShardEntry) -> list[tuple[str, str, int]]:
    """(file, sha256, bytes) of a shard and of its offsets."""
    offsets = entry.file.removesuffix(".tar") + SUFFIX
    return [(entry.file, entry.sha256, entry.bytes), (offsets, entry.offsets_sha256, 0)]
