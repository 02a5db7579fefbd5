"""Guidance: `weak + w (strong - weak)`, so that w = 1 is the plain conditional model.

`weak` is the same model with the null condition (classifier-free guidance, arXiv 2207.12598), or a
smaller or younger model with the same condition (autoguidance, arXiv 2406.02507).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.diffusion.denoiser import DenoiserOutput


def guided(
    model: Callable[..., DenoiserOutput],
    z_t: Tensor,
    t: Tensor,
    cond: Any,
    uncond: Any,
    guidance_scale: float,
    guide: Callable[..., DenoiserOutput] | None = None,
) -> Tensor:
    """Guided prediction (B, C, H, W) float32; a learned variance is left out.

    At scale 1 by one forward of B rows; with a `guide` by one of each model; else by one of 2B
    rows, for which `uncond` is needed.
    """
    if guidance_scale == 1.0:
        return _prediction(model, z_t, t, cond)
    if guide is not None:
        strong = _prediction(model, z_t, t, cond)
        weak = _prediction(guide, z_t, t, cond)
        return weak + guidance_scale * (strong - weak)
    if uncond is None:
        raise TypeError(
            f"guidance_scale={guidance_scale} needs uncond, the null condition of every row"
        )
    both = _prediction(model, torch.cat([z_t, z_t]), torch.cat([t, t]), concatenate(uncond, cond))
    without, with_ = both.chunk(2)
    return without + guidance_scale * (with_ - without)


def _prediction(model: Callable[..., DenoiserOutput], z_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """First C channels of the output; a learned variance, if any, comes after them."""
    return model(z_t, t, cond).output[:, : z_t.shape[1]].float()


def concatenate(first: Any, second: Any) -> Any:
    """Join two conditions along the batch.

    Each is a dataclass of tensors (or None) whose first dimension is the batch.
    """
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}
    return type(first)(
        **{name: None if pair[0] is None else torch.cat(pair) for name, pair in pairs.items()}
    )
