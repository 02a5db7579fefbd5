"""Peak bytes of live tensors inside a `with` block, counted on any device, meta included.

Storage that was allocated inside the block counts, once for all its views.  Scratch memory inside a
kernel is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live: ...`, then `live.peak`; `live.now` is what is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor, fresh=False)
        results = function(*args, **kwargs)
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor, fresh=True)
        return results

    def _track(self, tensor: torch.Tensor, *, fresh: bool) -> None:
        """Count a new storage: a result's was allocated in the block, an argument's outside."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if fresh else 0
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size
