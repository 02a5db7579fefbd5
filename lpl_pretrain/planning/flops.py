"""Count the FLOPs of a function, 2 for a multiply-add.

Only shapes are used, so meta tensors are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lpl_pretrain.config.dataset import DatasetIndex

AnyModule = TypeVar("AnyModule", bound=nn.Module)
aten = torch.ops.aten
FORMULAS = {
    **flop_registry,
    # what attention is on a CPU, which torch does not count; on meta tensors it is plain matrix
    # products
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention in `function()`, backward included.

    Other operations are not counted, as usual.
    """
    with _Counter() as counter:
        function()
    return counter.total


class _Counter(TorchDispatchMode):
    """torch's formulas without its bookkeeping of modules, which cannot follow a leaf through a
    region without gradient.
    """

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = FORMULAS.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def on_meta(module: AnyModule) -> AnyModule:
    """Copy a module onto the meta device: shapes without data."""
    meta = {}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = tensor.detach().to("meta")
        meta[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return deepcopy(module, meta)


def mean_over_buckets(index: DatasetIndex, sample: Callable[[int, int], None]) -> float:
    """FLOPs of `sample(height, width)`, averaged over the samples of all buckets."""
    total = 0
    for bucket in index.buckets:
        total += bucket.samples * count_flops(partial(sample, bucket.height, bucket.width))
    return total / index.samples
