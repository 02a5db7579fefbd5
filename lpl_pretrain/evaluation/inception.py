"""The Inception network of the Frechet Inception Distance (arXiv 1706.08500), as ported from
TensorFlow's 2015-12-05 graph.

It is torchvision's InceptionV3 with other pooling branches: averages that do not count the padding,
and one maximum.  Weights: the file known as pt_inception-2015-12-05-6726825d.pth (pytorch-fid and
torch-fidelity share its layout).  Input: uint8 (N, 3, H, W), resized as by TensorFlow 1 (corners at
0, no half-pixel centres) and scaled by (x - 128) / 128.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models import inception

from lpl_pretrain.config import extractors
from lpl_pretrain.config.extractors import FID_WEIGHTS_HELP, FID_WEIGHTS_SHA256_START
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.extractor import (
    MAX_ERROR_LENGTH,
    Extractor,
    ExtractorSpec,
)

CLASSES = 1008
FEATURES = 2048
SIDE_PX = 299
SPATIAL_CHANNELS = 7


def load_inception(config: ExtractorConfig, device: torch.device) -> Extractor:
    """Load the FID Inception from a file of weights.  Raises ConfigError.

    Scores by other weights than the published ones are named after the weights' hash.
    """
    path = Path(str(config.weights))
    try:
        sha256 = file_sha256(path)
        network: Any = FIDInception(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # torch.load raises errors of many kinds for a damaged file
        raise ConfigError(
            f"extractors.{config.label}.weights={path}: not the FID Inception's weights "
            f"({str(error)[:MAX_ERROR_LENGTH]}): {FID_WEIGHTS_HELP}"
        ) from None
    suffix = f"_{config.name or f'inception_{sha256[:8]}'}"
    if sha256.startswith(FID_WEIGHTS_SHA256_START) and config.name is None:
        suffix = ""
    return Extractor(
        config=config,
        suffix=suffix,
        dimension=FEATURES,
        weights_sha256=sha256,
        preprocessing=f"TensorFlow 1 bilinear to {SIDE_PX} px; (x - 128) / 128",
        network=network.to(device, memory_format=torch.channels_last),  # 1.5 times as fast on a CPU
        extract=lambda network, pixels: network(pixels),
    )


def average_without_padding(x: Tensor) -> Tensor:
    """3x3 average pooling that leaves padding out of its counts."""
    return avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """3x3 maximum pooling."""
    return max_pool2d(x, kernel_size=3, stride=1, padding=1)


def with_pool(block: Any, pool: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    """Subclass `block` so that its pooling branch, always the last one, uses `pool`."""

    class Pooled(block):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

    return Pooled


class FIDInception(nn.Module):
    """The network with three outputs, float32.

    pooled:  (N, 2048)
    logits:  (N, 1008), without their bias, as the Inception Score uses them
    spatial: (N, 2023), the first 7 channels of mixed_6/conv at 17x17, as sFID uses them
             (arXiv 2103.03841)
    """

    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        """Build it frozen, in eval mode.  Raises RuntimeError when names or shapes do not fit."""
        super().__init__()
        self.trunk = fid_inception(state_dict)
        self.classifier = nn.Buffer(state_dict["fc.weight"].float())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """`pixels`: uint8 (N, 3, H_px, W_px)."""
        branch_outputs = []
        hook = self.trunk.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: branch_outputs.append(output)
        )
        try:
            pooled = self.trunk((resize_as_tensorflow1(pixels.float(), SIDE_PX) - 128) / 128)
        finally:
            hook.remove()
        return {
            "pooled": pooled,
            "logits": pooled @ self.classifier.T,
            "spatial": branch_outputs[0][:, :SPATIAL_CHANNELS].flatten(1),
        }


def fid_inception(state_dict: dict[str, Tensor]) -> inception.Inception3:
    """Build the trunk, frozen and in eval mode; its output is (N, 2048).

    Raises RuntimeError when names or shapes do not fit.
    """
    last_pools = iter((average_without_padding, maximum))
    with torch.device("meta"):
        network = inception.Inception3(
            num_classes=CLASSES,
            aux_logits=False,
            init_weights=False,
            inception_blocks=[
                inception.BasicConv2d,
                with_pool(inception.InceptionA, average_without_padding),
                inception.InceptionB,
                with_pool(inception.InceptionC, average_without_padding),
                inception.InceptionD,
                lambda channels: with_pool(inception.InceptionE, next(last_pools))(channels),
                inception.InceptionAux,
            ],
        )
    # a plain dict: BatchNorm then accepts that old files lack its counters
    network.load_state_dict(dict(state_dict), assign=True)
    network.fc = nn.Identity()
    return network.float().eval().requires_grad_(False)


def random_weights() -> dict[str, Tensor]:
    """Random weights in the layout of the published file, for comparing tools without it.

    The layout has no BatchNorm counters.
    """
    generator = torch.Generator().manual_seed(0)
    state = {}
    with torch.device("meta"):
        network = inception.Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("conv.weight"):
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif not name.endswith("num_batches_tracked"):
            state[name] = torch.randn(shape, generator=generator) * 0.1
    return state


def resize_as_tensorflow1(x: Tensor, side: int) -> Tensor:
    """Resize (N, C, H, W) to (N, C, side, side), bilinear, without antialiasing.

    Output pixel i reads input position i * H / side.
    """
    return _interpolate(_interpolate(x, 3, side), 2, side)


def _interpolate(x: Tensor, dim: int, side: int) -> Tensor:
    size = x.shape[dim]
    position = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(
        size / side, dtype=torch.float32
    )
    low = position.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    fraction = (position - low).view([-1 if i == dim else 1 for i in range(4)])
    below = x.index_select(dim, low)
    above = x.index_select(dim, high)
    # in TensorFlow's order of operations, so that rounding agrees too
    return below + (above - below) * fraction


INCEPTION = ExtractorSpec(extractors.INCEPTION, load_inception)
