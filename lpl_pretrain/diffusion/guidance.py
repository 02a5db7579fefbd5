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


def guided(
    model: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    cond: Any,
    uncond: Any,
    guidance_scale: float,
    guide: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The model's answer (B, C, H, W) float32.

    At scale 1 by one forward of B rows; with a `guide` by one of each model; else by one of 2B
    rows, for which `uncond` is needed.
    """
    if guidance_scale == 1.0:
        return model(z_t, t, cond).float()
    if guide is not None:
        strong, weak = model(z_t, t, cond).float(), guide(z_t, t, cond).float()
        return weak + guidance_scale * (strong - weak)
    if uncond is None:
        raise TypeError(
            f"guidance_scale={guidance_scale} needs uncond, the null condition of every row"
        )
    both = model(torch.cat([z_t, z_t]), torch.cat([t, t]), concatenate(uncond, cond)).float()
    without, with_ = both.chunk(2)
    return without + guidance_scale * (with_ - without)


def concatenate(first: Any, second: Any) -> Any:
    """Two conditions, each a dataclass of tensors (or None) whose first dimension is the batch, as
    one of the summed batch size.
    """
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}
    return type(first)(
        **{name: None if pair[0] is None else torch.cat(pair) for name, pair in pairs.items()}
    )
