"""Activation checkpointing and compilation of a model's blocks, before the model is sharded.

The order is fixed: checkpoint, compile, shard.  The compiled function includes the recomputation,
and the hooks that an engine registers on a block stay outside both.  Parameters keep their names.
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
SAVED_OPERATORS = {
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
"""Matrix products, convolutions and attention: `selective` saves their outputs and recomputes all
other activations.
"""


def prepare_blocks(model: nn.Module, blocks: list[str], config: ParallelConfig) -> None:
    """Wraps forward of the sub-modules named in `blocks`, in place; results stay the same."""
    kind = config.activation_checkpointing
    for index, name in enumerate(blocks):
        block = model.get_submodule(name)
        checkpointed = index % config.checkpoint_every_blocks == 0
        if kind is not ActivationCheckpointing.NONE and checkpointed:
            block.forward = _checkpointed(block.forward, kind)
        if config.compile:
            block.forward = torch.compile(block.forward)


def _checkpointed(forward: Callable[..., Any], kind: ActivationCheckpointing) -> Callable[..., Any]:
    """Returns `forward` with recomputation in backward; blocks draw no random numbers."""
    recompute = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if kind is ActivationCheckpointing.BLOCKS:
        return recompute
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return partial(recompute, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in SAVED_OPERATORS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
