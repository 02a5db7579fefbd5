"""Random weights in the layout of the published FID Inception, which no package carries."""

from __future__ import annotations

import torch

from lpl_pretrain.evaluation import inception


def inception_layout() -> dict[str, torch.Tensor]:
    """Under the names and shapes of the published file (it has no BatchNorm counters)."""
    generator, state = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        network = inception.inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("conv.weight"):
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif not name.endswith("num_batches_tracked"):
            state[name] = torch.randn(shape, generator=generator) * 0.1
    return state
