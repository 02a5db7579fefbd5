"""FLOPs of a piece of code, 2 for a multiply-add: counted from the shapes that pass by, so meta
tensors are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    """Of matrix products, convolutions and attention in `function()`, forward and backward; the
    rest is left out, as usual.
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
