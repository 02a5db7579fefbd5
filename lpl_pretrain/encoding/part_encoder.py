"""Encodes the parts of one process: decodes images on threads, encodes them in batches, writes
shards.

Batches never contain images of two parts, so that the bytes of a shard do not depend on the number
of processes.  A sample's .json has `image_sha256`, `class_name`, and in pixels (height, width) or
(top, left): `source_px`, `resized_px`, `crop_px`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.format import Sample
from lpl_pretrain.data.prefetch import prefetch_map
from lpl_pretrain.data.remote import download
from lpl_pretrain.encoding.decode_image import decode_image
from lpl_pretrain.encoding.encoders import Encoders
from lpl_pretrain.encoding.plan import Part, Plan
from lpl_pretrain.encoding.resize_crop import (
    ResizeCrop,
    aspect_buckets,
    nearest_bucket,
    plan_resize_crop,
    resize_and_crop,
)
from lpl_pretrain.encoding.source_image import BadImage, SourceImage, sample_digest
from lpl_pretrain.encoding.writer import PartWriter, Superseded
from lpl_pretrain.errors import DataError, is_transient
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.atomic import scratch_folder
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.preempt import needs_cleanup

DECODE_THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image with its pixels, resized and cropped."""

    image: SourceImage
    image_sha256: str
    source_px: tuple[int, int]
    resize_crop: ResizeCrop
    pixels: np.ndarray  # uint8 (height_px, width_px, 3)

    def metadata(self) -> dict[str, object]:
        """Content of the sample's .json."""
        return {
            "class_name": self.image.class_name,
            "image_sha256": self.image_sha256,
            "source_px": self.source_px,
            "resized_px": self.resize_crop.resized_px,
            "crop_px": self.resize_crop.crop_px,
        }

    def digest(self) -> int:
        """Summand of the part's source digest."""
        image = self.image
        return sample_digest(
            image.key, self.image_sha256, image.label, image.class_name, image.caption
        )


def bucket_shapes(config: EncodeConfig) -> list[tuple[int, int]]:
    """(height, width) in pixels of every bucket."""
    if config.buckets is None:
        return [(config.resolution_px, config.resolution_px)]
    return aspect_buckets(config.resolution_px, config.buckets.max_aspect, config.buckets.step_px)


def decode(image: SourceImage, config: EncodeConfig) -> DecodedImage:
    """Decodes, resizes and crops an image.  Raises DataError if it is unreadable."""
    encoded = image.read_bytes()
    pixels = decode_image(encoded, image.origin)
    crop_fraction = None
    if config.crop == "random":
        crop_fraction = (
            rng.key(config.seed, f"crop_row/{image.key}") / 2.0**64,
            rng.key(config.seed, f"crop_column/{image.key}") / 2.0**64,
        )
    source_px = (pixels.shape[0], pixels.shape[1])
    shape_px = nearest_bucket(source_px, bucket_shapes(config))
    resize_crop = plan_resize_crop(source_px, shape_px, crop_fraction)
    return DecodedImage(
        image,
        hashlib.sha256(encoded).hexdigest(),
        source_px,
        resize_crop,
        resize_and_crop(pixels, resize_crop),
    )


@dataclass(slots=True)
class PartEncoder:
    """Encodes parts with networks that are on `device`."""

    config: EncodeConfig
    encoders: Encoders
    plan: Plan
    device: torch.device
    _skipped_before: int = field(default=0)

    def run(self, parts: list[Part]) -> None:
        """Encodes `parts` in one pass, so that decoding does not wait at the end of a part."""
        total = None
        if all(part.samples is not None for part in parts):
            total = sum(part.samples or 0 for part in parts)
        needs_cleanup()
        has_remote_tars = any(part.unit.is_remote_tar for part in parts)
        with scratch_folder("lpl-encode") if has_remote_tars else nullcontext(Path()) as scratch:
            decoded = prefetch_map(
                self._decode,
                _list_images(parts, scratch),
                threads=DECODE_THREADS,
                buffer_size=max(4 * self.config.batch_size, DECODE_THREADS),
            )
            with closing(decoded), progress(total, " images", "encode") as bar:
                for part in parts:
                    self._encode_part(part, decoded, bar.update)
                    if part.unit.is_remote_tar:
                        (scratch / part.name).unlink(missing_ok=True)

    def _decode(self, image: SourceImage | BadImage | None) -> DecodedImage | BadImage | None:
        if not isinstance(image, SourceImage):
            return image
        try:
            return decode(image, self.config)
        except DataError as error:
            # a skipped image stays out of the data set; a transient error must not skip it
            if is_transient(error):
                raise
            return BadImage(image.origin, str(error))

    def _encode_part(
        self,
        part: Part,
        images: Iterator[DecodedImage | BadImage | None],
        advance: Callable[[float], object],
    ) -> None:
        """Encodes the images of this part, up to and including the None at its end."""
        part_images = iter(partial(next, images), None)
        writer = PartWriter(
            Path(self.config.output),
            part.name,
            self.encoders.autoencoder.latent_channels,
            self.config.shard_samples,
            self.plan.identity,
        )
        try:
            self._write_part(writer, part_images, advance)
        except Superseded as part_name:
            log.info("part %s is done by another process", part_name)
            for _ in part_images:
                pass
            writer.discard()
        except BaseException:
            writer.discard()
            raise

    def _write_part(
        self,
        writer: PartWriter,
        images: Iterable[DecodedImage | BadImage | None],
        advance: Callable[[float], object],
    ) -> None:
        source = 0
        skipped: list[str] = []
        class_names: dict[int, str] = {}
        pending: dict[tuple[int, int], list[DecodedImage]] = {}
        for decoded in images:
            assert decoded is not None
            if isinstance(decoded, BadImage):
                self._skip(decoded.reason, skipped)
                continue
            source += decoded.digest()
            image = decoded.image
            if image.label is not None and image.class_name is not None:
                class_names[image.label] = image.class_name
            shape_px = decoded.resize_crop.shape_px
            batch = pending.setdefault(shape_px, [])
            batch.append(decoded)
            if len(batch) == self.config.batch_size:
                self._encode_batch(pending.pop(shape_px), writer, skipped)
                advance(self.config.batch_size)
        for shape_px in sorted(pending):
            self._encode_batch(pending[shape_px], writer, skipped)
            advance(len(pending[shape_px]))
        self._skipped_before += len(skipped)
        writer.finish(skipped=skipped, class_names=class_names, source=source % 2**256)

    def _encode_batch(
        self, batch: list[DecodedImage], writer: PartWriter, skipped: list[str]
    ) -> None:
        pixels = np.stack([decoded.pixels for decoded in batch])
        moments = self.encoders.encode_moments(pixels, self.config)
        versions = [moments]
        if self.config.flips:
            mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
            versions.append(self.encoders.encode_moments(mirrored, self.config))
        texts = self.encoders.embed_captions([decoded.image.caption or "" for decoded in batch])
        for row, decoded in enumerate(batch):
            image = decoded.image
            overflows = [version.max_abs[row] for version in versions if not version.finite[row]]
            if overflows:
                self._skip(
                    f"{image.origin}: sample {image.key!r}: its moments reach {overflows[0]:g}, "
                    f"wanted finite values within {self.config.moments_dtype}: remove the image, "
                    "or set moments_dtype=bf16 or precision=fp32",
                    skipped,
                )
                continue
            sample = Sample(
                key=image.key,
                moments=moments.stored[row],
                label=image.label,
                caption=image.caption,
                metadata=decoded.metadata(),
                flipped=versions[1].stored[row] if self.config.flips else None,
                text={name: embeddings[row] for name, embeddings in texts.items()},
            )
            writer.add(sample, moments.floats[row])

    def _skip(self, reason: str, skipped: list[str]) -> None:
        """Appends `reason` to `skipped`.  Raises DataError if the policy is to stop, or if too many
        images are skipped.
        """
        if self.config.on_error is OnError.STOP:
            raise DataError(reason)
        log.warning("skipped: %s", reason)
        skipped.append(reason)
        num_skipped = self._skipped_before + len(skipped)
        total = self.plan.samples or 0
        if total and num_skipped > self.config.max_skipped_fraction * total:
            raise DataError(
                f"{num_skipped} of {total} images cannot be read, more than "
                f"max_skipped_fraction={self.config.max_skipped_fraction}; the last: {reason}"
            )


def _list_images(parts: Sequence[Part], scratch: Path) -> Iterator[SourceImage | BadImage | None]:
    """The images of each part, then None.  A remote tar is downloaded to `scratch`, named by its
    part.
    """
    for part in parts:
        yield from part.images(partial(download, path=scratch / part.name))
        yield None
