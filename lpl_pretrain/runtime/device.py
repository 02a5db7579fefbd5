"""What the machine's processor or accelerator can do."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def bf16_is_native(device: torch.device) -> bool:
    """False where bf16 is emulated: on a CPU without the instructions a convolution takes a hundred
    times longer.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def device_name(device: torch.device) -> str:
    """As its vendor calls it; `cpu` for every CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> dict[str, float]:
    """`peak_gib`: the most that tensors have taken of a GPU since the process began; nothing on a
    CPU.
    """
    return (
        {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
        if device.type == "cuda"
        else {}
    )


def keep_freed_memory() -> None:
    """For training on a CPU: keep what a step has freed for the next one, instead of giving it back
    and faulting it in again.

    glibc decides that by what lies at the top of its heap; where it went wrong, a tenth of a step
    was page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library does as it likes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
