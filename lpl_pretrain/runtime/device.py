"""What the machine's processor or accelerator can do."""

from __future__ import annotations

import torch


def bf16_is_native(device: torch.device) -> bool:
    """False where bf16 is emulated: on a CPU without the instructions a convolution takes a hundred times longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def name_of(device: torch.device) -> str:
    """As its vendor calls it; `cpu` for every CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
