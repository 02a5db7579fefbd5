"""The Inception network of the Frechet Inception Distance (arXiv 1706.08500), as ported from
TensorFlow's 2015-12-05 graph.

It is torchvision's InceptionV3 with other pooling branches: averages that do not count the padding,
and one maximum. Weights: the file known as pt_inception-2015-12-05-6726825d.pth (pytorch-fid and
torch-fidelity share its layout).
Input:   uint8 (N, 3, H, W), resized as TensorFlow 1 did (corners at 0, no half-pixel centres) and scaled by (x - 128) / 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models import inception

CLASSES = 1008
FEATURES = 2048
SIDE_PX = 299
SPATIAL_CHANNELS = 7


def average_without_padding(x: Tensor) -> Tensor:
    return avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    return max_pool2d(x, kernel_size=3, stride=1, padding=1)


def with_pool(block: Any, pool: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    """The class `block` with its pooling branch, always the last one, computed through `pool`."""

    class Pooled(block):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

    return Pooled


class FIDInception(nn.Module):
    """uint8 (N, 3, H_px, W_px) -> `pooled` (N, 2048), `logits` (N, 1008) without their bias, as the
    Inception Score has them, and `spatial` (N, 2023), the first 7 channels of mixed_6/conv at
    17x17, as sFID has them (arXiv 2103.03841); float32.
    """

    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        """Frozen, in eval mode.  Raises RuntimeError when names or shapes do not fit."""
        super().__init__()
        self.trunk = fid_inception(state_dict)
        self.classifier = nn.Buffer(state_dict["fc.weight"].float())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        seen = []
        hook = self.trunk.Mixed_6d.branch1x1.register_forward_hook(
            lambda *call: seen.append(call[2])
        )
        try:
            pooled = self.trunk((resize_as_tensorflow1(pixels.float(), SIDE_PX) - 128) / 128)
        finally:
            hook.remove()
        return {
            "pooled": pooled,
            "logits": pooled @ self.classifier.T,
            "spatial": seen[0][:, :SPATIAL_CHANNELS].flatten(1),
        }


def fid_inception(state_dict: dict[str, Tensor]) -> inception.Inception3:
    """In eval mode and frozen.  Raises RuntimeError when names or shapes do not fit."""
    last = iter((average_without_padding, maximum))
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
                lambda channels: with_pool(inception.InceptionE, next(last))(channels),
                inception.InceptionAux,
            ],
        )
    network.load_state_dict(
        dict(state_dict), assign=True
    )  # a plain dict: BatchNorm then forgives that old files lack its counters
    network.fc = nn.Identity()
    return network.float().eval().requires_grad_(False)


def random_weights() -> dict[str, Tensor]:
    """Under the names and shapes of the published file (it has no BatchNorm counters), for
    comparing tools without it.
    """
    generator, state = torch.Generator().manual_seed(0), {}
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
    """Bilinear (N, C, H, W) -> (N, C, side, side): output pixel i reads input position i * H /
    side; no antialiasing.
    """
    return _interpolate(_interpolate(x, 3, side), 2, side)


def _interpolate(x: Tensor, dim: int, side: int) -> Tensor:
    size = x.shape[dim]
    position = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(
        size / side, dtype=torch.float32
    )
    low = position.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = (position - low).view([-1 if i == dim else 1 for i in range(4)])
    below, above = x.index_select(dim, low), x.index_select(dim, high)
    return (
        below + (above - below) * share
    )  # in TensorFlow's order of operations, so that rounding agrees too
