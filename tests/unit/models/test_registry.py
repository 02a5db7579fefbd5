"""The registry is the one list of models and autoencoder families: a toy of each takes one spec."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from torch import nn

from lpl_pretrain.config.autoencoder import FAMILIES, AutoencoderInfo
from lpl_pretrain.config.base import Section
from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import ModelConfig
from lpl_pretrain.config.schema import ParallelConfig, Prediction, ScheduleKind
from lpl_pretrain.diffusion.denoiser import Denoiser, DenoiserOutput, check_hidden_blocks
from lpl_pretrain.diffusion.objective import denoise
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.models.autoencoder import Autoencoder, decoder_stages, latent_scaling
from lpl_pretrain.models.build import build_denoiser, check_denoiser_runs
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.decoder import DecoderStages
from lpl_pretrain.models.registry import AUTOENCODERS, MODELS
from lpl_pretrain.models.spec import AutoencoderSpec, ModelSpec
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.runtime.world import World
from tests.support.indexes import dataset_index

LATENT = LatentEntry(channels=4, height=8, width=8, mean=[0.0] * 4, std=[1.0] * 4)


class ToyConfig(Section):
    kind: Literal["toy"] = "toy"
    width: int = 8


class Toy(Denoiser):
    def __init__(self, config, channels, num_classes):
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv2d(channels, config.width, 3, padding=1)
        self.labels = nn.Embedding(num_classes + 1, config.width)
        self.blocks = nn.ModuleList(nn.Conv2d(config.width, config.width, 1) for _ in range(2))
        self.conv_out = nn.Conv2d(config.width, channels, 3, padding=1)

    def sharded_blocks(self):
        return ["blocks.0", "blocks.1"]

    def forward(self, z_t, t, cond, hidden_blocks=()):
        check_hidden_blocks(hidden_blocks, len(self.blocks))
        x = self.conv_in(z_t) + (self.labels(cond.labels) + t[:, None])[:, :, None, None]
        hidden = {}
        for index, block in enumerate(self.blocks):
            x = x + block(x).relu()
            if index in hidden_blocks:
                hidden[index] = x
        return DenoiserOutput(self.conv_out(x), hidden)


TOY = ModelSpec(
    config=ToyConfig,
    build=lambda config, latent, num_classes, text: Toy(config, latent.channels, num_classes),
    float8_skip=("labels",),
)


def test_a_fourth_model_takes_one_spec(monkeypatch):
    monkeypatch.setitem(MODELS, TOY.kind, TOY)
    check_denoiser_runs(ToyConfig(), dataset_index(side=8))
    model = build_denoiser(ToyConfig(), LATENT, 3, seed=1)
    assert model.float8_skip == ("labels",)
    strategy = make_strategy(ParallelConfig(precision="fp32"), World(), torch.device("cpu"))
    denoiser = strategy.setup(
        model, model.sharded_blocks(), lambda p: torch.optim.AdamW(p.values(), fused=True)
    )
    schedule, t = make_schedule(ScheduleKind.RECTIFIED_FLOW), torch.rand(2)
    z0, eps = torch.randn(2, 2, 4, 8, 8)
    cond = Conditioning(torch.tensor([0, 3]))
    result = denoise(
        denoiser, Prediction.FLOW, z0, eps, t, *schedule.coefficients(t), cond, hidden_blocks=(1,)
    )
    assert result.hidden[1].shape == (2, 8, 8, 8)
    before = model.conv_out.weight.clone()
    strategy.backward(result.mse.mean(), microbatch=0, of=1)
    assert strategy.step(lr=0.1, max_grad_norm=1.0).applied
    assert not torch.equal(model.conv_out.weight, before)


class ToyAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.out = nn.Conv2d(6, 3, 1)


TOY_AUTOENCODER = AutoencoderSpec(
    family="ToyAutoencoder",
    decoder_stages=lambda network: DecoderStages(
        nn.Identity(), {"mid": [nn.Identity()], "up0": [network.up]}, network.out
    ),
    shift_and_scale=lambda network, facts: (0.5, 2.0),
)


def test_a_further_autoencoder_family_takes_one_spec(monkeypatch):
    monkeypatch.setitem(AUTOENCODERS, TOY_AUTOENCODER.family, TOY_AUTOENCODER)
    facts = AutoencoderInfo("ToyAutoencoder", 4, 2, {"mid": 1, "up0": 2}, 0.0, None)
    autoencoder = Autoencoder(ToyAutoencoder(), "0" * 64, facts)
    assert (autoencoder.shift, autoencoder.scale) == (0.5, 2.0)
    scaling = latent_scaling("autoencoder", dataset_index(side=8))
    features = DecoderFeatures(decoder_stages(autoencoder.network), scaling, facts.stages)
    z0 = torch.randn(1, 4, 8, 8, requires_grad=True)
    outputs = features(z0)
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == {
        "mid": (1, 4, 8, 8),
        "up0": (1, 6, 16, 16),
    }
    outputs["up0"].square().mean().backward()
    assert z0.grad.abs().sum() > 0


def test_every_kind_of_the_configuration_has_a_spec_and_every_family_too():
    union, _ = get_args(ModelConfig)
    assert [get_args(member)[0] for member in get_args(union)] == [
        spec.config for spec in MODELS.values()
    ]
    assert list(AUTOENCODERS) == list(FAMILIES)


@pytest.mark.parametrize("kind", MODELS)
def test_fp8_skips_the_layers_of_the_condition(kind):
    assert MODELS[kind].float8_skip
    assert MODELS[kind].diffusers is not None
