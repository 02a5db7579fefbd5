"""What the trainer gets from the data: latents as stored, not yet sampled or normalised, and what
is known about them.

Shapes: moments (B, 2C, H, W), the posterior's mean then its standard deviation;  labels,
sample_indices (B,) int64; sizes (B, 6) int64.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextBatch:
    """One encoder's view of the captions."""

    states: Tensor  # (B, T, D) float16, zero behind each caption's end
    lengths: Tensor  # (B,) int64, true tokens of each
    pooled: Tensor | None = None  # (B, P) float16

    def map(self, function: Callable[[Tensor], Tensor]) -> TextBatch:
        return TextBatch(
            function(self.states),
            function(self.lengths),
            None if self.pooled is None else function(self.pooled),
        )


@dataclass(frozen=True, slots=True)
class LatentBatch:
    moments: Tensor
    """float16 or bfloat16, as stored; float32 after `to`."""
    labels: Tensor
    """Class id; -1 is no class."""
    sample_indices: Tensor
    """Global sample counts: they name the random draws of each sample (runtime/rng.py)."""
    sizes: Tensor
    """(height, width) of the source, (top, left) of the crop in the resized picture, (height,
    width) of the crop, in pixels: what SDXL is conditioned on (arXiv 2307.01952, section 2.2).  -1:
    not recorded.  For flipped samples, of the mirrored picture.
    """
    captions: list[str] | None = None
    """Only when asked for; "" for a picture without one."""
    text: dict[str, TextBatch] = field(default_factory=dict)
    """By encoder; only those that were asked for."""
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """(folder, shard, row) that each sample was read from."""

    def to(self, device: torch.device | str) -> LatentBatch:
        """Does not wait for the copy when the batch is pinned; moments become float32 on the other
        side.
        """
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, moments=moved.moments.float())

    def pin_memory(self) -> LatentBatch:
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> LatentBatch:
        return LatentBatch(
            function(self.moments),
            function(self.labels),
            function(self.sample_indices),
            function(self.sizes),
            self.captions,
            {name: text.map(function) for name, text in self.text.items()},
            self.places,
        )


def on_device(
    batches: Generator[LatentBatch, None, None], device: torch.device
) -> Generator[LatentBatch, None, None]:
    """`batches`, on `device`.  On CUDA each is copied on a stream of its own while the one before
    it is worked on.

    Closing this closes `batches`.
    """
    with closing(batches):
        if device.type != "cuda":
            yield from (batch.to(device) for batch in batches)
            return
        copies = _copies(batches, device)
        ready = next(copies, None)
        while ready is not None:
            batch, copied = ready
            ready = next(copies, None)
            compute = torch.cuda.current_stream(device)
            compute.wait_event(copied)
            batch.map(partial(_keep_for, stream=compute))
            yield batch


def _copies(
    batches: Iterator[LatentBatch], device: torch.device
) -> Iterator[tuple[LatentBatch, torch.cuda.Event]]:
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            copied, done = batch.to(device), stream.record_event()
        yield copied, done


def _keep_for(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Its memory is not given to anybody before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor
