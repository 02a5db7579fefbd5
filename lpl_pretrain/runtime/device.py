"""Properties of the processor or accelerator, and memory settings of the host."""

from __future__ import annotations

import ctypes

import torch

# Parameters of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def bf16_is_native(device: torch.device) -> bool:
    """Whether the device has bf16 instructions.

    Without them a CPU emulates bf16: a convolution takes a hundred times longer.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def device_name(device: torch.device) -> str:
    """Vendor's name of a GPU; `cpu` for every CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most GiB of a GPU that tensors have occupied since the process started, as `peak_gib`.

    Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next training step instead of returning it to the OS.

    By default glibc decides by what is at the top of its heap; where it decided to return memory,
    page faults took a tenth of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such function
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest value that it accepts
