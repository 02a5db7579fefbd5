"""Random access to latents by sample index: any batch, at any point of training, without state.

The caller decides which sample indices it reads; the stream knows neither ranks nor steps, so a
resumed run just reads the next indices.  An unreadable sample stops the run or, if the
configuration says so, is replaced by another sample of its pool, drawn by (seed, sample index) and
therefore the same one on every layout of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from lpl_pretrain.config.check import data_problems
from lpl_pretrain.config.data_mixture import DataFolders, read_data
from lpl_pretrain.config.dataset import contents_of
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.data.bad_samples import BadSample, BadSampleLog
from lpl_pretrain.data.batch import AnyBatch, LatentBatch, TextEmbeddings, on_device
from lpl_pretrain.data.format import NUMPY_DTYPES, CaptionEmbedding
from lpl_pretrain.data.open_shards import OpenShards
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.data.prefetch import prefetch_map
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.log import log

Request = TypeVar("Request")
MIN_PREFETCHED_BATCHES = 4
MAX_SUBSTITUTES = 100
"""Samples that are tried instead of an unreadable one."""
INFINITY = {"fp16": 0x7C00, "bf16": 0x7F80}
"""Bit patterns of infinity; those of NaN are above, those of finite magnitudes below."""
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class RequestedFields:
    """Fields that a run reads besides latents, labels and sizes."""

    captions: bool = False
    text: tuple[str, ...] = ()
    """Names of text encoders whose stored embeddings are read."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One sample without its latent."""

    label: int
    micro_conditioning: np.ndarray  # (6,) as in data/offsets.py
    caption: str | None
    text: dict[str, CaptionEmbedding]
    location: tuple[int, int, int]


class LatentStream:
    """One or several finished data folders, opened for reading.

    Methods raise DataError that names the shard and the key of an unreadable sample.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        requested: RequestedFields | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.requested = requested or RequestedFields()
        self.folders = read_data(config.folder)
        self.index = self.folders.merged
        warn_without_digests(self.folders)
        if problems := data_problems(config, self.index, self.requested.text):
            raise ConfigError("\n".join(problems))
        self.order = SampleOrder(
            self.folders,
            seed,
            global_batch_size,
            lanes=config.lanes,
            shuffle_block_samples=config.shuffle_block_samples,
        )
        self.bad_samples = BadSampleLog(config, self.folders.indexes)
        self.shards = OpenShards(config, self.folders, self.order, self.bad_samples)

    def close(self) -> None:
        """Cancels downloads that have not begun, waits for the others, closes open shards."""
        self.shards.close()

    def location_name(self, location: tuple[int, int, int]) -> str:
        """Name of a stored sample for messages."""
        folder, shard, row = location
        file = self.folders.indexes[folder].shards[shard].file
        parent = f"{self.folders.paths[folder]}/" if len(self.folders.paths) > 1 else ""
        return f"{parent}{file} row {row}"

    def state(self, samples_seen: int, jumped_samples: int = 0) -> dict:
        """Data position of a run after `samples_seen` samples: JSON, the same on every rank.

        `jumped_samples`: samples that rollbacks jumped over (trainer/rollback.py).
        """
        return {
            "samples_seen": samples_seen,
            "epoch": (samples_seen + jumped_samples) // self.index.samples,
            "seed": self.seed,
            "fingerprint": self.index.fingerprint,
            "contents": contents_of(self.index),
        }

    def read(self, sample_indices: Sequence[int]) -> LatentBatch:
        """The samples with these indices, in this order; all of them must be of one bucket."""
        indices = np.asarray(sample_indices, dtype=np.int64)
        locations = self.order.locate(indices).tuples()
        self.shards.prefetch(indices)
        flips = self._flips(indices)
        buckets = {self._bucket(folder, shard) for folder, shard, _ in locations}
        assert len(buckets) <= 1, (
            f"samples {sample_indices} belong to different global batches, in buckets "
            f"{sorted(buckets)}"
        )
        height, width = next(iter(buckets), (self.index.latent.height, self.index.latent.width))
        stored = np.empty(
            (len(locations), 2 * self.index.latent.channels, height, width),
            dtype=NUMPY_DTYPES[self.index.moments_dtype],
        )
        raw = stored.reshape(len(locations), -1).view(np.uint8)
        records = [
            self._read_sample(index, location, flipped, buffer)
            for index, location, flipped, buffer in zip(
                indices.tolist(), locations, flips.tolist(), raw, strict=True
            )
        ]
        for i in np.flatnonzero(self._not_finite(raw)).tolist():
            records[i] = self._read_sample(
                int(indices[i]), locations[i], bool(flips[i]), raw[i], check_finite=True
            )
        return self._collate(stored, records, flips, indices)

    def prefetch(
        self, requests: Iterable[Sequence[int]], device: torch.device | None = None
    ) -> Generator[LatentBatch, None, None]:
        """Yields `read(request)` for each request, as `prefetch_with` does."""
        return self.prefetch_with(self.read, requests, device)

    def prefetch_with(
        self,
        read: Callable[[Request], AnyBatch],
        requests: Iterable[Request],
        device: torch.device | None = None,
    ) -> Generator[AnyBatch, None, None]:
        """Yields `read(request)` for each request, called ahead on `workers` threads
        and copied to `device` (CUDA: through pinned memory).

        `requests` is consumed a few batches ahead; closing the iterator joins the threads.
        """
        pin = device is not None and device.type == "cuda"
        batches = prefetch_map(
            lambda request: read(request).pin_memory() if pin else read(request),
            requests,
            threads=self.config.workers,
            buffer_size=max(MIN_PREFETCHED_BATCHES, 2 * self.config.workers),
        )
        return batches if device is None else on_device(batches, device)

    def verify(
        self, *, rank: int = 0, world_size: int = 1
    ) -> list[tuple[int, int, int | None, str]]:
        """Reads every byte of shards `rank`, `rank + world_size`, ... and compares checksums.

        Returns (folder, shard, row or None, reason) of each corrupt sample; row None is the whole
        shard.  Raises DataError for the first one if the configuration says `stop`.
        """
        corrupt = []
        shards = [
            (folder, shard)
            for folder, index in enumerate(self.folders.indexes)
            for shard in range(len(index.shards))
        ]
        for folder, shard in shards[rank::world_size]:
            if self.bad_samples.reason(folder, shard, None):
                continue
            try:
                bad_samples = self.shards.get(folder, shard).verify()
            except DataError as error:
                bad_samples = [BadSample(None, str(error))]
            if bad_samples and self.bad_samples.stop_on_error:
                raise DataError(bad_samples[0].reason)
            corrupt += [(folder, shard, bad.row, bad.reason) for bad in bad_samples]
        return corrupt

    def _read_sample(
        self,
        sample_index: int,
        location: tuple[int, int, int],
        flipped: bool,
        buffer: np.ndarray,
        check_finite: bool = False,
    ) -> SampleRecord:
        """Reads the sample at `location` or, if it is unreadable and may be skipped, a substitute
        from its pool; its latent goes to `buffer`.

        `check_finite` checks this latent for NaN and infinity.  Otherwise the caller checks the
        whole batch, which is faster.
        """
        folder, shard, row = location
        for attempt in range(MAX_SUBSTITUTES):
            try:
                return self._read_location(folder, shard, row, flipped, buffer, check_finite)
            except DataError as error:
                self.bad_samples.add(folder, shard, row, str(error))
            folder, shard, row = self.order.substitute_location(
                location, rng.key(self.seed, "substitute", sample_index, attempt)
            )
        raise DataError(
            f"{self.folders.paths[folder]}: {MAX_SUBSTITUTES} samples in a row cannot be read: "
            "encode the folder again"
        )

    def _read_location(
        self,
        folder: int,
        shard: int,
        row: int,
        flipped: bool,
        buffer: np.ndarray,
        check_finite: bool,
    ) -> SampleRecord:
        """Reads one sample.  Raises DataError if it is unreadable, or known to be."""
        if reason := self.bad_samples.reason(folder, shard, row):
            raise DataError(reason)
        opened = self.shards.get(folder, shard)
        opened.read_moments(row, flipped, memoryview(buffer))  # type: ignore[arg-type]
        if check_finite and self._not_finite(buffer[None])[0]:
            raise DataError(
                f"{opened.where(row)}: NaN or infinity in its latent, wanted finite values: encode "
                "the folder again"
            )
        caption = opened.read_caption(row) if self.requested.captions else None
        text = {
            name: opened.read_text(row, name, self.index.text[name]) for name in self.requested.text
        }
        return SampleRecord(
            int(opened.offsets.label[row]),
            opened.offsets.micro[row],
            caption,
            text,
            (folder, shard, row),
        )

    def _not_finite(self, raw: np.ndarray) -> np.ndarray:
        """(B, bytes) uint8 stored latents -> (B,) bool, True with NaN or infinity in a latent."""
        magnitudes = raw.view("<i2") & 0x7FFF
        return magnitudes.max(axis=1, initial=0) >= INFINITY[self.index.moments_dtype]

    def _flips(self, indices: np.ndarray) -> np.ndarray:
        """Sample indices (B,) -> (B,) bool, True for samples that are read mirrored."""
        if not self.config.flips:
            return np.zeros(len(indices), dtype=bool)
        return (rng.uniform(self.seed, "flip", indices.tolist()) < 0.5).numpy()

    def _collate(
        self,
        stored: np.ndarray,
        records: list[SampleRecord],
        flips: np.ndarray,
        indices: np.ndarray,
    ) -> LatentBatch:
        dtype = torch.float16 if self.index.moments_dtype == "fp16" else torch.bfloat16
        return LatentBatch(
            moments=torch.from_numpy(stored.view("<i2")).view(dtype),
            labels=torch.tensor([record.label for record in records], dtype=torch.int64),
            sample_indices=torch.from_numpy(indices),
            sizes=self._sizes(records, flips, stored.shape[2:]),
            captions=[record.caption or "" for record in records]
            if self.requested.captions
            else None,
            text={
                name: _pad_and_stack(
                    [record.text[name] for record in records], self.index.text[name].width
                )
                for name in self.requested.text
            },
            locations=[record.location for record in records],
        )

    def _sizes(
        self, records: list[SampleRecord], flips: np.ndarray, latent: tuple[int, ...]
    ) -> torch.Tensor:
        """(B, 6) int64 as LatentBatch.sizes; `latent`: (height, width) in latent pixels."""
        micro = np.array([record.micro_conditioning for record in records], dtype=np.int64)
        micro = micro.reshape(-1, 3, 2)
        source = micro[:, 0]
        resized = micro[:, 1]
        crop = micro[:, 2]
        target = np.array(latent, dtype=np.int64) * self.index.autoencoder.downscale
        mirrored = flips & (crop[:, 1] >= 0)
        crop[mirrored, 1] = resized[mirrored, 1] - target[1] - crop[mirrored, 1]
        return torch.from_numpy(
            np.concatenate([source, crop, np.broadcast_to(target, source.shape)], axis=1)
        )

    def _bucket(self, folder: int, shard: int) -> tuple[int, int]:
        """(height, width) of the latents of a shard."""
        index = self.folders.indexes[folder]
        bucket = index.buckets[index.shards[shard].bucket]
        return bucket.height, bucket.width


def warn_without_digests(folders: DataFolders) -> None:
    """Logs one line, once in a process, for each folder of format 2."""
    for path, index in zip(folders.paths, folders.indexes, strict=True):
        if index.format_version < 3 and path not in _warned:
            _warned.add(path)
            log.warning(
                "%s: format 2: its index.json and null text have no checksums, so corruption of "
                "them goes unnoticed; `lpl-pretrain data seal %s` checks the folder and adds them "
                "(runs on it go on)",
                path,
                path,
            )


def _pad_and_stack(embeddings: list[CaptionEmbedding], width: int) -> TextEmbeddings:
    """A batch of embeddings, padded with zeros to the longest; `width`: D of the encoder."""
    lengths = [len(embedding.tokens) for embedding in embeddings]
    states = np.zeros((len(embeddings), max(lengths, default=0), width), dtype=np.float16)
    for i, embedding in enumerate(embeddings):
        states[i, : lengths[i]] = embedding.floats()
    pooled = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
    return TextEmbeddings(
        torch.from_numpy(states),
        torch.tensor(lengths),
        torch.from_numpy(np.stack(pooled)) if pooled else None,
    )
