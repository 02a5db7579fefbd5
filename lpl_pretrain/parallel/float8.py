"""Float8 matrix products for the linear layers of the blocks (torchao); everything else computes as
under bf16.

Each tensor is scaled by its own current maximum (arXiv 2209.05433, section 3): inputs and weights
become e4m3, gradients e5m2.  Weights keep their names, values and dtype.  The layers before and
after the blocks stay as they are, and so do those inside a block that turn the condition into a
modulation (`Denoiser.float8_skip`): their input has one row per sample, too few for float8 to pay
off.
"""

from __future__ import annotations

import torch
from torch import nn

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.device import device_name

MIN_COMPUTE_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
SIZE_MULTIPLE = 16
"""Both sizes of a weight must be divisible by this for a float8 product."""


def use_float8(model: nn.Module, blocks: list[str], device: torch.device) -> None:
    """Converts layers in place.  Raises ConfigError if the device has no float8 products, if
    torchao is not installed, or if no layer has a suitable size.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        raise ConfigError(
            "parallel.precision='fp8': its products need an NVIDIA GPU of compute capability 8.9 "
            f"or newer (Ada, Hopper, Blackwell), this is {device_name(device)}: use bf16"
        )
    convert_linear_layers(model, blocks, emulate=False)


def convert_linear_layers(model: nn.Module, blocks: list[str], *, emulate: bool) -> int:
    """Converts the layers in place and returns their number.

    With `emulate`, products round to float8 and multiply in float32, on any device (tests).
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            "parallel.precision='fp8': torchao is not installed: pip install 'lpl-pretrain[fp8]'"
        ) from error
    num_converted = 0
    skipped: tuple[str, ...] = getattr(model, "float8_skip", ())

    def is_suitable(layer: nn.Module, name: str) -> bool:
        nonlocal num_converted
        suitable = _is_suitable(layer) and not any(part in name for part in skipped)
        num_converted += suitable
        return suitable

    # Padded: the gradient of a weight sums over the tokens, whose number need not be a multiple.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(
            model.get_submodule(block), module_filter_fn=is_suitable, config=config
        )
    if not num_converted:
        raise ConfigError(
            "parallel.precision='fp8': no linear layer of the blocks has both sides a multiple of "
            f"{SIZE_MULTIPLE}: choose such a model.width, or use bf16"
        )
    return num_converted


def _is_suitable(layer: nn.Module) -> bool:
    """Whether a float8 product can replace this layer's and is faster."""
    return (
        isinstance(layer, nn.Linear)
        and layer.in_features % SIZE_MULTIPLE == 0
        and layer.out_features % SIZE_MULTIPLE == 0
    )
