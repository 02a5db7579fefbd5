"""What is done to a model's blocks before it is sharded: activation checkpointing, then
compilation; names stay as they were.

The order is fixed: checkpoint, compile, shard.  The compiled function is what recomputes, and the
hooks that an engine hangs on a block stay outside both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lpl_pretrain.config.schema import ActivationCheckpointing, ParallelConfig

aten = torch.ops.aten
EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Products and attention: their outputs are kept by `selective`, everything between them is
computed again.
"""


def prepare_blocks(model: nn.Module, blocks: list[str], config: ParallelConfig) -> None:
    """Changes how the blocks' forward runs, in place; what it computes stays the same."""
    for number, name in enumerate(blocks):
        block = model.get_submodule(name)
        if (
            config.activation_checkpointing is not ActivationCheckpointing.NONE
            and number % config.checkpoint_every_blocks == 0
        ):
            block.forward = _recomputing(block.forward, config.activation_checkpointing)
        if config.compile:
            block.forward = torch.compile(block.forward)


def _recomputing(forward: Callable[..., Any], kind: ActivationCheckpointing) -> Callable[..., Any]:
    if kind is ActivationCheckpointing.BLOCKS:
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return partial(
        checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
    )
