"""A trained denoiser as a folder that diffusers loads: network, autoencoder, scheduler,
model_index.json and a model card.

DiT (eps, v) becomes a DiTPipeline, MMDiT a StableDiffusion3Pipeline, the SDXL U-Net a
StableDiffusionXLPipeline; the last two without text encoders: they are given embeddings.  Only JSON
and safetensors are written.
"""

from __future__ import annotations

import json
import shutil
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.config.model import DiTConfig, MMDiTConfig
from lpl_pretrain.config.online_text import text_entries
from lpl_pretrain.config.schema import Prediction, ScheduleKind, TrainConfig
from lpl_pretrain.config.text_layout import text_shape
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models import convert_dit, convert_mmdit
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.layers import sincos_position_embedding
from lpl_pretrain.models.unet import UNet

IMAGENET_CLASSES = 1000
"""The null class of DiTPipeline, whatever the data: smaller tables are filled up with ours."""
NO_COMPONENT = [None, None]
SD3, SDXL = "StableDiffusion3Pipeline", "StableDiffusionXLPipeline"
ENCODERS = (
    "image_encoder",
    "feature_extractor",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
)
MISSING = {"DiTPipeline": (), SDXL: ENCODERS, SD3: (*ENCODERS, "text_encoder_3", "tokenizer_3")}
"""Parts of a pipeline that a folder does not hold; diffusers wants to be told so."""
BETAS: dict[ScheduleKind, dict[str, Any]] = {
    ScheduleKind.LINEAR: {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ScheduleKind.SCALED_LINEAR: {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    ScheduleKind.COSINE: {"beta_schedule": "squaredcos_cap_v2"},
}


def write_pipeline(
    folder: Path,
    config: TrainConfig,
    index: DatasetIndex,
    state: dict[str, Tensor],
    facts: dict[str, str],
) -> None:
    """`state`: whole weights in our names; `facts`: for the card.  Raises ConfigError for what
    diffusers cannot express.
    """
    check(config, index)
    name, network_class, settings, theirs, pipeline, others = network_of(config, index, state)
    scheduler_class, scheduler = scheduler_of(config)
    _write_json(folder / name / "config.json", {"_class_name": network_class, **settings})
    save_file(
        {key: tensor.contiguous() for key, tensor in theirs.items()},
        folder / name / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": scheduler_class, **scheduler},
    )
    (folder / "vae").mkdir()
    autoencoder, weights = resolve_path(config.autoencoder), "diffusion_pytorch_model.safetensors"
    shutil.copyfile(autoencoder / weights, folder / "vae" / weights)
    scaling = {"scaling_factor": index.autoencoder.scale, "shift_factor": index.autoencoder.shift}
    _write_json(
        folder / "vae" / "config.json",
        {**json.loads((autoencoder / "config.json").read_text()), **scaling},
    )
    parts = {
        name: ["diffusers", network_class],
        "scheduler": ["diffusers", scheduler_class],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    about = {"_class_name": pipeline, "_diffusers_version": metadata.version("diffusers")}
    _write_json(folder / "model_index.json", {**about, **parts, **others})
    (folder / "README.md").write_text(card(config, index, facts, pipeline))


def check(config: TrainConfig, index: DatasetIndex) -> None:
    """Relations that a pipeline of diffusers takes for granted."""
    facts = read_autoencoder(config.autoencoder, resolve_path(config.autoencoder))
    kind, prediction = config.model.kind, config.diffusion.prediction
    problems = []
    if facts.family != "AutoencoderKL":
        problems.append(
            f"autoencoder={config.autoencoder} is a {facts.family}: these pipelines of diffusers "
            "want an AutoencoderKL"
        )
    if config.data.scaling != "autoencoder":
        problems.append(
            f"data.scaling={config.data.scaling}: diffusers knows one factor for all channels; "
            "train with autoencoder"
        )
    if index.autoencoder.shift and kind != "mmdit":
        problems.append(
            f"autoencoder={config.autoencoder}: shifts latents by {index.autoencoder.shift}, which "
            "only mmdit's pipeline does"
        )
    if index.latent.height != index.latent.width:
        problems.append(f"latents of {index.latent.height}x{index.latent.width}: wanted squares")
    if kind == "dit" and prediction is Prediction.FLOW:
        problems.append(
            "diffusion.prediction=flow with model.kind=dit: diffusers' DiTPipeline knows eps and "
            "v; export a file"
        )
    if kind == "mmdit" and prediction is not Prediction.FLOW:
        problems.append(
            f"diffusion.prediction={prediction.value} with model.kind=mmdit: diffusers' pipeline "
            "knows flow"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def network_of(
    config: TrainConfig, index: DatasetIndex, state: dict[str, Tensor]
) -> tuple[str, str, dict[str, Any], dict[str, Tensor], str, dict[str, Any]]:
    """Folder, class, settings and weights of the network; class of the pipeline, and what else is
    in its index.
    """
    channels, side, model = index.latent.channels, index.latent.height, config.model
    if isinstance(model, DiTConfig):
        classes = len(index.classes)
        if classes < IMAGENET_CLASSES:
            table = state["y_embedder.embedding_table.weight"]
            filled = torch.cat([table, table[-1:].expand(IMAGENET_CLASSES - classes, -1)])
            state = {**state, "y_embedder.embedding_table.weight": filled}
        settings, theirs = convert_dit.to_diffusers(
            state, model, channels=channels, side=side, num_classes=max(classes, IMAGENET_CLASSES)
        )
        labels: dict[str, Any] = {
            "id2label": {str(i): name for i, name in enumerate(index.classes)}
        }
        return "transformer", "DiTTransformer2DModel", settings, theirs, "DiTPipeline", labels
    text = text_shape(
        config.conditioning.text_encoders, text_entries(config.conditioning, index.text)
    )
    if isinstance(model, MMDiTConfig):
        settings, theirs = convert_mmdit.to_diffusers(
            state, model, channels=channels, side=side, text=text
        )
        grid = side // model.patch_size
        theirs["pos_embed.pos_embed"] = sincos_position_embedding(model.width, grid, grid)
        return (
            "transformer",
            "SD3Transformer2DModel",
            settings,
            theirs,
            SD3,
            dict.fromkeys(MISSING[SD3], NO_COMPONENT),
        )
    if model.preset != "sdxl":
        raise ConfigError(
            f"model.preset={model.preset}: only sdxl has a pipeline that takes embeddings; "
            "export a file"
        )
    with torch.device("meta"):
        network = build_denoiser(model, index.latent, len(index.classes), text=text)
    assert isinstance(network, UNet)
    settings = {
        key: value for key, value in network.network.config.items() if not key.startswith("_")
    }
    theirs = {key.removeprefix("network."): tensor for key, tensor in state.items()}
    others = {**dict.fromkeys(MISSING[SDXL], NO_COMPONENT), "force_zeros_for_empty_prompt": False}
    return "unet", "UNet2DConditionModel", settings, theirs, SDXL, others


def scheduler_of(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Class and settings: our ddim at a number of steps that divides 1,000, our euler given its
    sigmas.
    """
    diffusion = config.diffusion
    if diffusion.prediction is Prediction.FLOW:
        return "FlowMatchEulerDiscreteScheduler", {
            "num_train_timesteps": 1000,
            "shift": diffusion.timesteps.shift,
        }
    settings: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "prediction_type": {Prediction.EPS: "epsilon", Prediction.V: "v_prediction"}[
            diffusion.prediction
        ],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
    }
    return "DDIMScheduler", settings | BETAS[diffusion.schedule]


def card(config: TrainConfig, index: DatasetIndex, facts: dict[str, str], pipeline: str) -> str:
    lines = {
        "model": f"{config.model.kind}, {config.diffusion.prediction.value} on "
        f"{config.diffusion.schedule.value}",
        "latent perceptual loss": "no"
        if config.lpl is None
        else f"yes, preset {config.lpl.preset}",
        "data fingerprint": index.fingerprint,
        "samples in the data": f"{index.samples:,}",
        **facts,
    }
    listed = "\n".join(
        f"- {escape(' '.join(f'{key}: {value}'.split()), quote=False)}"
        for key, value in lines.items()
    )
    absent = "".join(f", {part}=None" for part in MISSING[pipeline])
    given = (
        "It holds no text encoder: call it with prompt_embeds and pooled_prompt_embeds.\n\n"
        if absent
        else ""
    )
    load = f"    diffusers.{pipeline}.from_pretrained(FOLDER{absent})"
    return (
        f"# {config.name}\n\nA `{pipeline}` trained by lpl-pretrain. "
        f"{given}\n\n{load}\n\n{listed}\n"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
