"""Exported diffusers folders: the pipelines' images equal our sampler's from the same noise."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from lpl_pretrain.cli import export
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.protocol import SamplerConfig
from lpl_pretrain.config.records import FORMAT_VERSION
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.diffusion.samplers import sample
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.trained_run import open_run
from lpl_pretrain.models import mmdit_spec, unet_spec
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from tests.support.configs import TINY_MMDIT, TINY_SDXL, train_config
from tests.support.latents import captioned_dataset, tiny_dataset

CPU = torch.device("cpu")
MODELS = {
    "dit": {
        "kind": "dit",
        "width": 32,
        "depth": 2,
        "heads": 2,
        "learned_sigma": True,
        "timestep_frequencies": "diffusers",
    },
    "mmdit": TINY_MMDIT,
    "sdxl": TINY_SDXL,
}
DIFFUSIONS = {
    "dit": {"prediction": "eps", "schedule": "linear"},
    "mmdit": {"prediction": "flow", "schedule": "rectified_flow", "timesteps": {"shift": 3.0}},
    "sdxl": {"prediction": "v", "schedule": "scaled_linear"},
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return captioned_dataset(tmp_path_factory.mktemp("captioned"))


def exported(folder: Path, data, kind, **changes):
    """Export a run with random weights: (the opened run, the exported folder)."""
    conditioning = {} if kind == "dit" else {"text_encoders": ["clip", "t5"]}
    settings = {
        "model": MODELS[kind],
        "diffusion": DIFFUSIONS[kind],
        "conditioning": conditioning,
        **changes,
    }
    config = train_config(data__folder=data[0], autoencoder=data[1], **settings)
    run_dir = RunDir(folder / "run")
    run = assemble(config, run_dir, World(), CPU)
    torch.manual_seed(0)
    for _, piece in run.ema.local_averages():
        piece.tensor.normal_(std=0.05)
    run.checkpoints.save(3, run.strategy, run.ema, run.state(3), samples_seen=24)
    run.checkpoints.finish()
    run_dir.config.write_text(dump(config))
    scored = run_dir.evaluation(3, "quick")
    scored.parent.mkdir(parents=True)
    result = {"metric": "fd_x", "value": 12.345, "guidance_scale": 1.0, "weights": "ema"}
    record = {
        "format_version": FORMAT_VERSION,
        "step": 3,
        "protocol": {"name": "quick"},
        "results": [result],
    }
    scored.write_text(json.dumps(record))
    export.run(
        str(run_dir.path),
        weights="ema",
        step=None,
        sigma_rel=None,
        best=None,
        format="diffusers",
        output=str(folder / "out"),
    )
    trained = open_run(run_dir, CPU)
    trained.load(3, "ema")
    return trained, folder / "out"


def our_images(trained, noise, sampler, cond, uncond, scale):
    generator = trained.generator

    z0 = sample(
        generator.denoiser,
        generator.prediction,
        generator.schedule,
        sampler,
        noise,
        cond,
        uncond=uncond,
        guidance_scale=scale,
    )
    return (generator.decode(z0) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_dit(labelled, tmp_path, scale):
    trained, folder = exported(tmp_path, labelled, "dit")
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    assert pipeline.get_label_ids(["disc", "square"]) == [0, 1]
    arguments = {"guidance_scale": scale, "num_inference_steps": 10, "output_type": "pt"}
    got = pipeline([0, 1], generator=torch.Generator().manual_seed(7), **arguments).images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    cond, uncond = Conditioning(torch.tensor([0, 1])), Conditioning(torch.tensor([2, 2]))
    wanted = our_images(trained, noise, SamplerConfig(kind="ddim", steps=10), cond, uncond, scale)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.01


def conditions(trained):
    _, text, pooled = trained.generator.captions.draw(0, [0, 1])
    null, vector = trained.generator.captions.conditioner.null(2, CPU)
    labels, sizes = (
        torch.zeros(2, dtype=torch.int64),
        trained.generator.captions.sizes.expand(2, -1),
    )
    embeddings = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    embeddings |= {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": vector}
    return (
        Conditioning(labels, text, pooled, sizes),
        Conditioning(labels, null, vector, sizes),
        embeddings,
    )


def test_mmdit(captioned, tmp_path):
    trained, folder = exported(tmp_path, captioned, "mmdit")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, **dict.fromkeys(mmdit_spec.MISSING_COMPONENTS)
    )
    cond, uncond, embeddings = conditions(trained)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sigmas = [1 - i / 10 for i in range(10)]
    arguments = {"height": 32, "width": 32, "guidance_scale": 3.0, "output_type": "pt"}
    got = pipeline(
        **embeddings, **arguments, sigmas=sigmas, num_inference_steps=10, latents=noise
    ).images
    wanted = our_images(
        trained, noise, SamplerConfig(kind="euler", steps=10, shift=3.0), cond, uncond, 3.0
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.01


def test_sdxl(captioned, tmp_path):
    trained, folder = exported(tmp_path, captioned, "sdxl")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, **dict.fromkeys(unet_spec.MISSING_COMPONENTS)
    )
    cond, uncond, embeddings = conditions(trained)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    arguments = {"height": 32, "width": 32, "guidance_scale": 3.0, "output_type": "pt"}
    got = pipeline(**embeddings, **arguments, num_inference_steps=10, latents=noise).images
    wanted = our_images(trained, noise, SamplerConfig(kind="ddim", steps=10), cond, uncond, 3.0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.01


def test_model_card_and_refusals(labelled, tmp_path):
    _, folder = exported(tmp_path, labelled, "dit")
    card = (folder / "README.md").read_text()
    for phrase in (
        "DiTPipeline",
        "data fingerprint",
        "weights: ema",
        "step: 3",
        "fd_x 12.35 (w = 1)",
        "samples in the data: 32",
    ):
        assert phrase in card, phrase
    assert not [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".json", ".safetensors", ".md")
    ]
    with pytest.raises(ConfigError, match="is there already"):
        export.run(
            str(tmp_path / "run"),
            weights="ema",
            step=None,
            sigma_rel=None,
            best=None,
            format="diffusers",
            output=str(folder),
        )
    flow = {
        "diffusion": {"prediction": "flow", "schedule": "rectified_flow"},
        "data__scaling": "per_channel",
    }
    model = {**MODELS["dit"], "learned_sigma": False}
    with pytest.raises(
        ConfigError, match="(?s)data.scaling=per_channel.*prediction=flow with model.kind=dit"
    ):
        exported(tmp_path / "flow", labelled, "dit", model=model, **flow)
    assert not (tmp_path / "flow" / "out").exists()
