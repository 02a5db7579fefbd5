"""Pictures to latents: each part of the plan is decoded ahead on threads, encoded in batches, and
written by itself.

Killed at any moment and started again, parts that have a record stand, the others are made again,
and the folder ends up byte for byte the same.  Batches never cross a part, so the bytes do not
depend on how many processes share the work. The .json of a sample says `image_sha256`,
`class_name`, and in pixels (height, width) or (top, left): `source_px`, `resized_px`, `crop_px`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.dataset import FORMAT_VERSION, INDEX_NAME, DatasetIndex, read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.format import Sample
from lpl_pretrain.data.prefetch import prefetch_map
from lpl_pretrain.data.remote import download
from lpl_pretrain.encoding.encoders import Autoencoder, Networks, TextEncoder
from lpl_pretrain.encoding.images import (
    ResizeCrop,
    apply_fit,
    aspect_buckets,
    decode_picture,
    nearest_bucket,
    plan_fit,
)
from lpl_pretrain.encoding.index import begin, check_captions, publish_index, remove_records
from lpl_pretrain.encoding.pictures import Picture, Problem
from lpl_pretrain.encoding.plan import Part, Plan, make_plan, settings_of_bytes
from lpl_pretrain.encoding.writer import PartWriter, Superseded, record_path
from lpl_pretrain.errors import ConfigError, DataError, is_transient
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.atomic import scratch_folder
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.preempt import needs_cleanup
from lpl_pretrain.runtime.world import World

DECODE_THREADS = min(16, os.cpu_count() or 1)
SEAL = "`lpl-pretrain data seal FOLDER` checks the folder and adds them"


@dataclass(frozen=True, slots=True)
class Decoded:
    picture: Picture
    image_sha256: str
    source_px: tuple[int, int]
    fit: ResizeCrop
    pixels: np.ndarray  # uint8 (height_px, width_px, 3)

    def metadata(self) -> dict[str, object]:
        return {
            "class_name": self.picture.class_name,
            "image_sha256": self.image_sha256,
            "source_px": self.source_px,
            "resized_px": self.fit.resized_px,
            "crop_px": self.fit.crop_px,
        }


def encode(
    config: EncodeConfig,
    autoencoder: Autoencoder | None = None,
    text_encoders: dict[str, TextEncoder] | None = None,
    world: World | None = None,
) -> DatasetIndex | None:
    """Encodes this process's parts into config.output, and publishes its index when no part is
    missing.

    None: other processes have parts left.  A folder that was finished from the same inputs is left
    alone. Raises ConfigError, DataError.
    """
    world = world or World()
    networks = Networks.load(config, autoencoder, text_encoders)
    check_shapes(config, networks.autoencoder.downscale)
    plan, folder = make_plan(config, networks.identities()), Path(config.output)
    if (folder / INDEX_NAME).exists():
        return _accept_finished(config, plan)
    if plan.samples is not None:
        check_captions(config, plan.readable, plan.captioned, warn=True)
    begin(folder, plan)
    if (
        folder / INDEX_NAME
    ).exists():  # another process finished it meanwhile, whose records are gone
        return _accept_finished(config, plan)
    mine = [
        part
        for part in plan.parts[world.rank :: world.world_size]
        if not record_path(folder, part.name).exists()
    ]
    device = (
        torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    )
    PartEncoder(config, networks.to(device), plan, device).run(mine)
    missing = [part for part in plan.parts if not record_path(folder, part.name).exists()]
    if missing and not (folder / INDEX_NAME).exists():
        log.info(
            "%s: %d of %d parts are left to other processes", folder, len(missing), len(plan.parts)
        )
        return None
    index = None if missing else publish_index(config, plan, networks)
    return index or _accept_finished(config, plan)


def check_shapes(config: EncodeConfig, downscale: int) -> None:
    """Raises ConfigError for pictures that the autoencoder cannot take."""
    sides = {"resolution_px": config.resolution_px}
    if config.buckets is not None:
        sides = {"buckets.step_px": config.buckets.step_px}
        if config.buckets.step_px > config.resolution_px:
            raise ConfigError(
                f"buckets.step_px={config.buckets.step_px} with "
                f"resolution_px={config.resolution_px}: no bucket; use a smaller step"
            )
    for name, side in sides.items():
        if side % downscale:
            above = -(-side // downscale) * downscale
            raise ConfigError(
                f"{name}={side} is not a multiple of {downscale}, the pixels per "
                f"latent position of autoencoder={config.autoencoder}: choose one that is, such "
                f"as {above}"
            )


def shapes(config: EncodeConfig) -> list[tuple[int, int]]:
    """(height, width) in pixels of every bucket that a picture may go to."""
    if config.buckets is None:
        return [(config.resolution_px, config.resolution_px)]
    return aspect_buckets(config.resolution_px, config.buckets.max_aspect, config.buckets.step_px)


def decode(picture: Picture, config: EncodeConfig) -> Decoded:
    """Raises DataError for what is not a picture."""
    encoded = picture.read_bytes()
    pixels = decode_picture(encoded, picture.origin)
    place = None
    if config.crop == "random":
        row, column = (
            rng.key(config.seed, f"{purpose}/{picture.key}") / 2.0**64
            for purpose in ("crop_row", "crop_column")
        )
        place = (row, column)
    source_px = (pixels.shape[0], pixels.shape[1])
    fit = plan_fit(source_px, nearest_bucket(source_px, shapes(config)), place)
    return Decoded(
        picture, hashlib.sha256(encoded).hexdigest(), source_px, fit, apply_fit(pixels, fit)
    )


def _accept_finished(config: EncodeConfig, plan: Plan) -> DatasetIndex:
    index = read_index(config.output)
    remove_records(Path(config.output))
    if index.plan not in (plan.identity, plan.earlier_identity):
        raise DataError(
            f"output={config.output}: holds a data set made from other inputs "
            f"({_difference(config, index)}): "
            "name another output, or remove that folder"
        )
    if index.format_version < FORMAT_VERSION:
        log.warning(
            "%s: format %d, without checksums of its index: %s",
            config.output,
            index.format_version,
            SEAL,
        )
    if index.plan == plan.earlier_identity:
        log.warning(
            "%s: was encoded by an earlier version, which ignored colour profiles", config.output
        )
    log.info("%s: encoded already from this source; left alone", config.output)
    return index


def _difference(config: EncodeConfig, index: DatasetIndex) -> str:
    stored, asked = json.loads(index.config), settings_of_bytes(config)
    changed = [
        f"{key} {stored.get(key)!r} there, {value!r} now"
        for key, value in asked.items()
        if stored.get(key) != value
    ]
    return "; ".join(changed) or "source or encoders have changed"


@dataclass(slots=True)
class PartEncoder:
    config: EncodeConfig
    networks: Networks
    plan: Plan
    device: torch.device
    _skipped_before: int = field(default=0)

    def run(self, parts: list[Part]) -> None:
        """One pass over all parts, so that decoding never waits for a part to end."""
        total = (
            None
            if any(part.samples is None for part in parts)
            else sum(part.samples or 0 for part in parts)
        )
        needs_cleanup()
        remote = any(part.unit.is_remote_tar for part in parts)
        with scratch_folder("lpl-encode") if remote else nullcontext(Path()) as scratch:
            decoded = prefetch_map(
                self._decode,
                _work(parts, scratch),
                threads=DECODE_THREADS,
                buffer_size=max(4 * self.config.batch_size, DECODE_THREADS),
            )
            with closing(decoded), progress(total, " pictures", "encode") as bar:
                for part in parts:
                    self._encode_part(part, decoded, bar.update)
                    if part.unit.is_remote_tar:
                        (scratch / part.name).unlink(missing_ok=True)

    def _decode(self, item: Picture | Problem | None) -> Decoded | Problem | None:
        if not isinstance(item, Picture):
            return item
        try:
            return decode(item, self.config)
        except DataError as problem:
            if is_transient(problem):  # not the picture's fault: leaving it out would be for good
                raise
            return Problem(item.origin, str(problem))

    def _encode_part(
        self,
        part: Part,
        items: Iterator[Decoded | Problem | None],
        advance: Callable[[float], object],
    ) -> None:
        """`items` of this part, up to the None behind them."""
        mine = iter(partial(next, items), None)
        channels, shard_samples = (
            self.networks.autoencoder.latent_channels,
            self.config.shard_samples,
        )
        writer = PartWriter(
            Path(self.config.output), part.name, channels, shard_samples, self.plan.identity
        )
        try:
            self._fill(writer, mine, advance)
        except Superseded as part_name:
            log.info("part %s is done by another process", part_name)
            for _ in mine:
                pass
            writer.discard()
        except BaseException:
            writer.discard()
            raise

    def _fill(
        self,
        writer: PartWriter,
        items: Iterable[Decoded | Problem | None],
        advance: Callable[[float], object],
    ) -> None:
        source, skipped, class_names = 0, list[str](), dict[int, str]()
        waiting: dict[tuple[int, int], list[Decoded]] = {}
        for item in items:
            assert item is not None
            if isinstance(item, Problem):
                self._skip(item.reason, skipped)
                continue
            source += int.from_bytes(hashlib.sha256(_entry(item).encode()).digest(), "big")
            if item.picture.label is not None and item.picture.class_name is not None:
                class_names[item.picture.label] = item.picture.class_name
            batch = waiting.setdefault(item.fit.shape_px, [])
            batch.append(item)
            if len(batch) == self.config.batch_size:
                self._encode_batch(waiting.pop(item.fit.shape_px), writer, skipped)
                advance(self.config.batch_size)
        for shape in sorted(waiting):
            self._encode_batch(waiting[shape], writer, skipped)
            advance(len(waiting[shape]))
        self._skipped_before += len(skipped)
        writer.finish(skipped=skipped, class_names=class_names, source=source % 2**256)

    def _encode_batch(self, batch: list[Decoded], writer: PartWriter, skipped: list[str]) -> None:
        pixels = np.stack([item.pixels for item in batch])
        encoded = [self.networks.moments(pixels, self.config)]
        if self.config.flips:
            encoded.append(
                self.networks.moments(np.ascontiguousarray(pixels[:, :, ::-1]), self.config)
            )
        texts = self.networks.texts([item.picture.caption or "" for item in batch])
        for row, item in enumerate(batch):
            picture = item.picture
            wrong = [version.reach[row] for version in encoded if not version.finite[row]]
            if wrong:
                self._skip(
                    f"{picture.origin}: sample {picture.key!r}: its moments reach {wrong[0]:g}, "
                    "wanted finite values within "
                    f"{self.config.moments_dtype}: remove the picture, or set moments_dtype=bf16 "
                    "or precision=fp32",
                    skipped,
                )
                continue
            sample = Sample(
                picture.key,
                encoded[0].stored[row],
                picture.label,
                picture.caption,
                item.metadata(),
                encoded[1].stored[row] if self.config.flips else None,
                {name: rows[row] for name, rows in texts.items()},
            )
            writer.add(sample, encoded[0].floats[row])

    def _skip(self, reason: str, skipped: list[str]) -> None:
        if self.config.on_error is OnError.STOP:
            raise DataError(reason)
        log.warning("skipped: %s", reason)
        skipped.append(reason)
        count, total = self._skipped_before + len(skipped), self.plan.samples or 0
        if total and count > self.config.max_skipped_fraction * total:
            raise DataError(
                f"{count} of {total} pictures cannot be read, more than "
                f"max_skipped_fraction={self.config.max_skipped_fraction}; "
                f"the last: {reason}"
            )


def _work(parts: Sequence[Part], scratch: Path) -> Iterator[Picture | Problem | None]:
    """What each part holds, and None at its end.  A remote tar is brought here and lies in
    `scratch` under its part's name.
    """
    for part in parts:
        yield from part.items(partial(download, path=scratch / part.name))
        yield None


def _entry(item: Decoded) -> str:
    picture = item.picture
    return json.dumps(
        [picture.key, item.image_sha256, picture.label, picture.class_name, picture.caption]
    )
