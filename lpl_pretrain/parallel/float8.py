"""Linear layers of the blocks with float8 products (torchao): 8 bits into the tensor cores,
everything else as under bf16.

Scales are taken anew from every tensor (arXiv 2209.05433, section 3): inputs and weights e4m3,
gradients e5m2.  Weights stay what they were, under their names.  Not touched are the layers before
and after the blocks, and in them those that turn the condition into a modulation: they see one row
a sample, too few to gain anything.
"""

from __future__ import annotations

import torch
from torch import nn

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.device import name_of

CAPABILITY = (8, 9)  # of CUDA devices: Ada; Hopper is 9.0
MULTIPLE = 16  # a float8 product wants both sides of a weight to be a multiple of it
PER_SAMPLE = ("modulation", "time_emb_proj")  # in the names of the layers that see the condition


def use_float8(model: nn.Module, blocks: list[str], device: torch.device) -> None:
    """Swaps layers in place.  Raises ConfigError where there is no hardware, no torchao, or no
    layer of a fitting size.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ConfigError(
            "parallel.precision='fp8': its products need an NVIDIA GPU of compute capability 8.9 "
            "or newer "
            f"(Ada, Hopper, Blackwell), this is {name_of(device)}: use bf16"
        )
    swap_layers(model, blocks, emulate=False)


def swap_layers(model: nn.Module, blocks: list[str], *, emulate: bool) -> int:
    """Returns how many layers were swapped.  `emulate`: rounds to float8 and multiplies in float32,
    on any device (tests).
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            "parallel.precision='fp8': torchao is not installed: pip install 'lpl-pretrain[fp8]'"
        ) from error
    swapped = 0

    def fits(layer: nn.Module, name: str) -> bool:
        nonlocal swapped
        fitting = (
            isinstance(layer, nn.Linear)
            and layer.in_features % MULTIPLE == 0
            and layer.out_features % MULTIPLE == 0
        )
        fitting = fitting and not any(part in name for part in PER_SAMPLE)
        swapped += fitting
        return fitting

    # padded: the gradient of a weight sums over the tokens, whose number need not be such a
    # multiple
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)

    for block in blocks:
        convert_to_float8_training(model.get_submodule(block), module_filter_fn=fits, config=config)
    if not swapped:
        raise ConfigError(
            "parallel.precision='fp8': no linear layer of the blocks has both sides a multiple of "
            f"{MULTIPLE}: "
            "choose such a model.width, or use bf16"
        )
    return swapped
