"""The contract between the code that trains or samples and the network that denoises.

Every network in models/ is a `Denoiser`; the objective, the samplers and the loss terms call it
without knowing which.  A strategy returns a wrapped denoiser, which is called in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class DenoiserOutput(NamedTuple):
    """Result of one forward pass.

    A NamedTuple, not a dataclass: FSDP2 and DeepSpeed hook the tensors of a module's output, which
    they find in tuples and dictionaries only.
    """

    output: Tensor
    """(B, C, H, W) prediction; (B, 2C, H, W) where a variance is predicted too."""
    hidden: dict[int, Tensor]
    """Output of each block that was asked for, by its index in `sharded_blocks()`, with its graph:
    (B, N, D) image tokens, row-major, of a transformer; (B, C_l, H_l, W_l) of a U-Net."""


class Denoiser(nn.Module):
    """Base class of the networks under training."""

    config: Any
    """The model section of the configuration that the network was built from."""
    float8_skip: tuple[str, ...] = ()
    """Parts of the names of linear layers that fp8 leaves in bf16: those whose input is the
    condition, with one row per sample.  Set by `build_denoiser` from the model's spec."""

    def sharded_blocks(self) -> list[str]:
        """Names of the sub-modules that a strategy may shard, checkpoint or compile one by one, in
        forward order.
        """
        raise NotImplementedError

    def forward(
        self, z_t: Tensor, t: Tensor, cond: Any, hidden_blocks: tuple[int, ...] = ()
    ) -> DenoiserOutput:
        """Predict from `z_t` (B, C, H, W) at times `t` (B,) in [0, 1].

        `hidden_blocks`: indices of the blocks whose outputs are returned too.  Raises ValueError
        for an index that is out of range.
        """
        raise NotImplementedError


def check_hidden_blocks(hidden_blocks: Sequence[int], num_blocks: int) -> None:
    """Raises ValueError for an index outside 0 .. num_blocks - 1."""
    outside = [index for index in hidden_blocks if not 0 <= index < num_blocks]
    if outside:
        raise ValueError(
            f"hidden_blocks={tuple(hidden_blocks)}: the model has {num_blocks} blocks: use indices "
            f"from 0 to {num_blocks - 1}"
        )
