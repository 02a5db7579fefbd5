"""The U-Net is diffusers' own, given our time and conditions; it trains under every strategy and
loads a diffusers folder.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.init_from import InitConfig
from lpl_pretrain.config.model import UNetConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning, known_sizes
from lpl_pretrain.trainer.init_from import load_init_from

LATENT = LatentEntry(channels=4, height=8, width=8, mean=[0.0] * 4, std=[1.0] * 4)
TEXT = TextShape(tokens=7, width=16, pooled_width=12)
SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4),
}
CONFIGS = {
    "ldm": UNetConfig(preset="ldm", settings={**SMALL, "cross_attention_dim": 16}),
    "sd": UNetConfig(preset="sd", settings=SMALL),
    "sdxl": UNetConfig(preset="sdxl", settings={**SMALL, "addition_time_embed_dim": 8}),
}


def model_of(preset):
    return build_denoiser(CONFIGS[preset], LATENT, 3, text=None if preset == "ldm" else TEXT)


def inputs(count=2):
    torch.manual_seed(1)
    sizes = torch.tensor([[64, 80, 0, 8, 32, 32]]).expand(count, -1)
    cond = Conditioning(
        torch.arange(count) % 4, torch.randn(count, 7, 16), torch.randn(count, 12), sizes
    )
    return torch.randn(count, 4, 8, 8), torch.tensor([0.25, 0.999])[:count], cond


@pytest.mark.parametrize("preset", CONFIGS)
def test_blocks_exist_and_every_parameter_gets_a_gradient(preset):
    model = model_of(preset)
    assert [model.get_submodule(name) for name in model.sharded_blocks()]
    model(*inputs()).output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "preset, heeded", [("ldm", {"labels"}), ("sd", {"text"}), ("sdxl", {"text", "pooled", "sizes"})]
)
def test_it_heeds_its_conditions_and_no_others(preset, heeded):
    model = model_of(preset)
    z_t, t, cond = inputs(1)
    out = model(z_t, t, cond).output
    for name in ("labels", "text", "pooled", "sizes"):
        moved = model(z_t, t, replace(cond, **{name: getattr(cond, name) + 1})).output
        assert torch.equal(moved, out) != (name in heeded), name


def test_diffusers_gets_timesteps_and_time_ids():
    model = model_of("sdxl")
    z_t, t, cond = inputs()
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes.float()}
    theirs = model.network(
        z_t, torch.tensor([250.0, 999.0]), encoder_hidden_states=cond.text, added_cond_kwargs=added
    ).sample
    torch.testing.assert_close(model(z_t, t, cond).output, theirs, rtol=1e-5, atol=1e-6)


def test_a_diffusers_folder(tmp_path):
    model = model_of("sdxl")
    model.network.save_pretrained(tmp_path)
    torch.manual_seed(5)
    fresh = build_denoiser(CONFIGS["sdxl"], LATENT, 3, seed=9, text=TEXT)
    load_init_from(InitConfig(diffusers=str(tmp_path)), fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters()))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_init_from(InitConfig(diffusers=str(tmp_path)), model_of("sd"))


@pytest.mark.parametrize(("preset", "millions"), [("ldm", 401), ("sd", 860), ("sdxl", 2567)])
def test_published_sizes(preset, millions):
    """LDM-4 on ImageNet 400 M, SD 1.5 860 M, SDXL 2.6 B."""
    text = {"ldm": None, "sd": TextShape(77, 768, 0), "sdxl": TextShape(77, 2048, 1280)}[preset]
    latent = LATENT.model_copy(update={"channels": 3 if preset == "ldm" else 4})
    with torch.device("meta"):
        model = build_denoiser(UNetConfig(preset=preset), latent, 1000, text=text)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_sizes_that_were_not_recorded():
    recorded, unknown = [64, 80, 0, 8, 32, 40], [-1, -1, -1, -1, 32, 40]
    assert known_sizes(torch.tensor([recorded, unknown])).tolist() == [
        recorded,
        [32, 40, 0, 0, 32, 40],
    ]


def test_what_follows_from_the_data_is_not_set_by_hand():
    with pytest.raises(ValueError, match="settings.in_channels: follows from the data"):
        UNetConfig(preset="sd", settings={"in_channels": 4})
    assert UNetConfig(preset="sd").latent_multiple == 8 and CONFIGS["sdxl"].latent_multiple == 2
