"""Batches as the data pipeline hands them to the trainer: latents as stored, neither sampled nor
normalised, with their labels, text and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class Batch(Protocol):
    """Tensors that the prefetch threads make and that are copied to the device as a whole."""

    def to(self, device: torch.device | str) -> Any: ...
    def pin_memory(self) -> Any: ...
    def map(self, function: Callable[[Tensor], Tensor]) -> Any: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """Embeddings of a batch of captions by one text encoder, padded to the longest caption."""

    states: Tensor  # (B, T, D) float16 token embeddings; zero after the end of each caption
    lengths: Tensor  # (B,) int64 number of tokens of each caption
    pooled: Tensor | None = None  # (B, P) float16

    def map(self, function: Callable[[Tensor], Tensor]) -> TextEmbeddings:
        """Applies `function` to every tensor."""
        return TextEmbeddings(
            function(self.states),
            function(self.lengths),
            None if self.pooled is None else function(self.pooled),
        )


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """B samples of one bucket."""

    moments: Tensor
    """(B, 2C, H, W) mean, then standard deviation, of the autoencoder's posterior; float16 or
    bfloat16 as stored, float32 after `to`.
    """
    labels: Tensor
    """(B,) int64 class id; -1: no class."""
    sample_indices: Tensor
    """(B,) int64 global sample indices, which key the random draws of each sample
    (runtime/rng.py); they stay on the host.
    """
    sizes: Tensor
    """(B, 6) int64 micro-conditioning of SDXL (arXiv 2307.01952, section 2.2), in pixels: (height,
    width) of the source image, (top, left) of the crop in the resized image, (height, width) of the
    crop.  -1: not recorded.  Flipped samples have the values of the mirrored image.
    """
    captions: list[str] | None = None
    """None unless requested; "" for an image without a caption."""
    text: dict[str, TextEmbeddings] = field(default_factory=dict)
    """Encoder name -> embeddings, for the requested encoders."""
    locations: list[tuple[int, int, int]] = field(default_factory=list)
    """(folder, shard, row) that each sample was read from."""

    def to(self, device: torch.device | str) -> LatentBatch:
        """Copies the batch to `device`, moments as float32; asynchronous if the batch is pinned."""
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, moments=moved.moments.float())

    def pin_memory(self) -> LatentBatch:
        """Copies the batch to page-locked memory."""
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> LatentBatch:
        """Applies `function` to every tensor."""
        return LatentBatch(
            function(self.moments),
            function(self.labels),
            self.sample_indices,
            function(self.sizes),
            self.captions,
            {name: text.map(function) for name, text in self.text.items()},
            self.locations,
        )


def on_device(
    batches: Generator[AnyBatch, None, None], device: torch.device
) -> Generator[AnyBatch, None, None]:
    """Copies each batch to `device`.  On CUDA a separate stream copies the next batch while the
    consumer works on the current one.

    Closing this generator closes `batches`.
    """
    with closing(batches):
        if device.type != "cuda":
            yield from (batch.to(device) for batch in batches)
            return
        copies = _copies(batches, device)
        pending = next(copies, None)
        while pending is not None:
            batch, copy_done = pending
            pending = next(copies, None)
            compute = torch.cuda.current_stream(device)
            compute.wait_event(copy_done)
            batch.map(partial(_record_stream, stream=compute))
            yield batch


def _copies(
    batches: Iterator[AnyBatch], device: torch.device
) -> Iterator[tuple[AnyBatch, torch.cuda.Event]]:
    """(batch on `device`, event that the end of its copy sets), copied on a stream of their own."""
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = batch.to(device)
            copy_done = stream.record_event()
        yield copy, copy_done


def _record_stream(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Keeps the allocator from reusing the memory of `tensor` before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor
