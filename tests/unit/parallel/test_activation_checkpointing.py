"""Activation checkpointing and compilation of blocks change neither gradients nor parameter names,
and checkpointing saves memory.
"""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.parallel.activation_checkpointing import prepare_blocks
from lpl_pretrain.planning.flops import count_flops
from lpl_pretrain.planning.live_bytes import LiveBytes

LATENT = LatentEntry(channels=4, height=16, width=16, mean=[0.0] * 4, std=[1.0] * 4)
KINDS = {
    "none": {},
    "every second block": {"activation_checkpointing": "blocks", "checkpoint_every_blocks": 2},
    "selective": {"activation_checkpointing": "selective"},
    "blocks": {"activation_checkpointing": "blocks"},
}


def model_of(**options: object) -> torch.nn.Module:
    model = build_denoiser(
        DiTConfig(width=64, depth=4, heads=4, patch_size=2), LATENT, num_classes=3
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prepare_blocks(model, model.sharded_blocks(), ParallelConfig.model_validate(options))
    return model


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(8, 4, 16, 16, generator=generator)
    t = torch.rand(8, generator=generator)
    return model(z_t, t, Conditioning(torch.arange(8) % 3)).output.square().mean()


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_names_stay_the_same(kind: str) -> None:
    wanted = gradients_of(model_of())
    got = gradients_of(model_of(**KINDS[kind]))
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


def test_compiled_blocks_give_the_same_gradients() -> None:
    wanted = gradients_of(model_of())
    got = gradients_of(model_of(compile=True, activation_checkpointing="blocks"))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def peak_and_flops(kind: str) -> tuple[int, int]:
    model = model_of(**KINDS[kind])
    gradients_of(model)  # allocates the gradients before the bytes are counted
    with LiveBytes() as live:
        loss_of(model).backward()
    flops = count_flops(lambda: loss_of(model).backward())
    return live.peak, flops


def test_memory_falls_and_flops_rise_with_the_checkpointed_blocks() -> None:
    """Order: none, every second block, all blocks; selective recomputes no matrix product."""
    none = peak_and_flops("none")
    second = peak_and_flops("every second block")
    selective = peak_and_flops("selective")
    blocks = peak_and_flops("blocks")
    assert blocks[0] < second[0] < none[0] and blocks[0] < selective[0] < none[0]
    assert none[1] == pytest.approx(selective[1], rel=1e-3) and none[1] < second[1] < blocks[1]
    assert blocks[1] / none[1] == pytest.approx(4 / 3, rel=0.05)  # forward twice, backward once
