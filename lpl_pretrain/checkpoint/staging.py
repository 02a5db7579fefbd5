"""What lets training go on while a checkpoint is written: copies of the state in the host's memory,
and work on a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.parallel.strategy import ParamRange


class HostCopies:
    """Buffers that are filled anew for every save: their memory is asked for once, pinned where
    there is a device to copy from.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def of(
        self, entries: Iterable[tuple[str, ParamRange]], device: torch.device
    ) -> list[tuple[str, ParamRange]]:
        """The same pieces on the host; they are valid until the next call."""
        cuda, copies = device.type == "cuda", []
        for kind, piece in entries:
            buffer = self._buffers.get((kind, piece.name))
            if buffer is None or buffer.shape != piece.tensor.shape:
                buffer = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=cuda)
                self._buffers[kind, piece.name] = buffer
            copies.append(
                (kind, replace(piece, tensor=buffer.copy_(piece.tensor, non_blocking=cuda)))
            )
        if cuda:
            torch.cuda.synchronize(device)
        return copies


class Task:
    """An action that may fail because of files, here or on a thread."""

    def __init__(self, what: str, action: Callable[[], None]) -> None:
        """`what` it means for a person when it fails."""
        self.what, self.action = what, action
        self.trouble: str | None = None
        self.cause: Exception | None = None
        self._thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        try:
            self.action()
        except CheckpointError as error:
            self.trouble, self.cause = str(error), error
        except Exception as error:  # on a thread nobody else would hear of it
            self.trouble, self.cause = f"{self.what}: {type(error).__name__}: {error}", error

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> str | None:
        """What went wrong, if anything."""
        self._thread.join()
        return self.trouble
