"""Every random draw is a function of (seed, purpose, ids): the same on any number of ranks, workers
and restarts.

No generator state is ever saved.  The ids identify the draw: a global sample index, a step, an
epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def key(seed: int, purpose: str, *ids: int) -> int:
    """64-bit seed of one draw."""
    name = f"{seed}/{purpose}/{'/'.join(map(str, ids))}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def numpy_generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *ids)))


def normal(seed: int, purpose: str, ids: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """(len(ids), *shape) float32 on CPU; row i depends on ids[i] alone."""
    generator = torch.Generator()
    rows = [torch.randn(shape, generator=generator.manual_seed(key(seed, purpose, i))) for i in ids]
    return torch.stack(rows)


def uniform(seed: int, purpose: str, ids: Iterable[int]) -> Tensor:
    """(len(ids),) float64 in [0, 1); element i depends on ids[i] alone."""
    values = [key(seed, purpose, i) / 2.0**64 for i in ids]
    return torch.tensor(values, dtype=torch.float64).clamp_(max=1 - 2.0**-53)
