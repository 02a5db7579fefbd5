"""Classifier-free guidance (arXiv 2207.12598): `uncond + w (cond - uncond)`, so that w = 1 is the plain conditional model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


def guided(model: Callable[..., Tensor], z_t: Tensor, t: Tensor, cond: Any, uncond: Any, guidance_scale: float) -> Tensor:
    """The model's answer (B, C, H, W) float32 by one forward of 2B rows; of B rows at scale 1, where `uncond` may be None."""
    if guidance_scale == 1.0:
        return model(z_t, t, cond).float()
    if uncond is None:
        raise TypeError(f"guidance_scale={guidance_scale} needs uncond, the null condition of every row")
    both = model(torch.cat([z_t, z_t]), torch.cat([t, t]), concatenate(uncond, cond)).float()
    without, with_ = both.chunk(2)
    return without + guidance_scale * (with_ - without)


def concatenate(first: Any, second: Any) -> Any:
    """Two conditions, each a dataclass of tensors whose first dimension is the batch, as one of the summed batch size."""
    return type(first)(**{f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(first)})
