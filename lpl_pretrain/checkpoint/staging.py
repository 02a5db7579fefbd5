"""Copies of the state in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lpl_pretrain.parallel.strategy import ParamRange


class HostCopies:
    """Host buffers that every save reuses; they are pinned if the state is on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(
        self, entries: Iterable[tuple[str, ParamRange]], device: torch.device
    ) -> list[tuple[str, ParamRange]]:
        """Copies the ranges to the host; the result is valid until the next call."""
        cuda = device.type == "cuda"
        copies = []
        for kind, param_range in entries:
            buffer = self._buffer(kind, param_range, pinned=cuda)
            buffer.copy_(param_range.tensor, non_blocking=cuda)
            copies.append((kind, replace(param_range, tensor=buffer)))
        if cuda:
            torch.cuda.synchronize(device)
        return copies

    def _buffer(self, kind: str, param_range: ParamRange, *, pinned: bool) -> Tensor:
        key = (kind, param_range.name)
        live = param_range.tensor
        if key not in self._buffers or self._buffers[key].shape != live.shape:
            self._buffers[key] = torch.empty(live.shape, dtype=live.dtype, pin_memory=pinned)
        return self._buffers[key]
