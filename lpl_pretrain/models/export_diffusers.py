"""Export a trained denoiser as a folder that diffusers loads.

The folder holds network, autoencoder, scheduler, model_index.json and a model card.  DiT (eps, v)
becomes a DiTPipeline, MMDiT a StableDiffusion3Pipeline, the SDXL U-Net a StableDiffusionXLPipeline;
the last two hold no text encoders and take embeddings.  Only JSON and safetensors are written.
"""

from __future__ import annotations

import json
import shutil
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.config.betas import BETA_RANGE
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.config.schema import Prediction, ScheduleKind, TrainConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.registry import MODELS
from lpl_pretrain.models.spec import DiffusersFormat, DiffusersNetwork

WEIGHTS = "diffusion_pytorch_model.safetensors"
NO_COMPONENT = [None, None]
"""Entry of model_index.json for a part that the folder does not hold."""
BETAS: dict[ScheduleKind, dict[str, Any]] = {
    **{
        kind: {"beta_schedule": kind.value, "beta_start": first, "beta_end": last}
        for kind, (first, last) in BETA_RANGE.items()
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
    """Write the pipeline of a run.

    `state`: whole weights under our names; `facts`: lines of the model card.  Raises ConfigError
    for what diffusers cannot express.
    """
    check(config, index)
    diffusers = diffusers_format(config)
    network = diffusers.to_pipeline(config, index, state)
    scheduler_class, scheduler = scheduler_of(config)
    _write_json(
        folder / network.folder / "config.json",
        {"_class_name": diffusers.class_name, **network.settings},
    )
    save_file(
        {key: tensor.contiguous() for key, tensor in network.state.items()},
        folder / network.folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": scheduler_class, **scheduler},
    )
    (folder / "vae").mkdir()
    autoencoder = resolve_path(config.autoencoder)
    shutil.copyfile(autoencoder / WEIGHTS, folder / "vae" / WEIGHTS)
    scaling = {"scaling_factor": index.autoencoder.scale, "shift_factor": index.autoencoder.shift}
    _write_json(
        folder / "vae" / "config.json",
        {**json.loads((autoencoder / "config.json").read_text()), **scaling},
    )
    parts = {
        network.folder: ["diffusers", diffusers.class_name],
        "scheduler": ["diffusers", scheduler_class],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    missing = dict.fromkeys(network.missing, NO_COMPONENT)
    about = {"_class_name": network.pipeline, "_diffusers_version": metadata.version("diffusers")}
    _write_json(folder / "model_index.json", {**about, **parts, **missing, **network.index_entries})
    (folder / "README.md").write_text(card(config, index, facts, network))


def diffusers_format(config: TrainConfig) -> DiffusersFormat:
    """Raises ConfigError for a model without a counterpart in diffusers."""
    found = MODELS[config.model.kind].diffusers
    if found is None:
        raise ConfigError(
            f"model.kind={config.model.kind}: diffusers has no such network; export a file"
        )
    return found


def check(config: TrainConfig, index: DatasetIndex) -> None:
    """Raises ConfigError for a run that a pipeline of diffusers cannot express."""
    facts = read_autoencoder(config.autoencoder, resolve_path(config.autoencoder))
    diffusers = diffusers_format(config)
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
    if index.autoencoder.shift and not diffusers.shifts_latents:
        problems.append(
            f"autoencoder={config.autoencoder}: shifts latents by {index.autoencoder.shift}, which "
            "only mmdit's pipeline does"
        )
    if index.latent.height != index.latent.width:
        problems.append(f"latents of {index.latent.height}x{index.latent.width}: wanted squares")
    problems += diffusers.pipeline_problems(config, index)
    if problems:
        raise ConfigError("\n".join(problems))


def scheduler_of(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Class and settings of the scheduler.

    They equal our ddim at a number of steps that divides 1,000, and our euler given its sigmas.
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


def card(
    config: TrainConfig, index: DatasetIndex, facts: dict[str, str], network: DiffusersNetwork
) -> str:
    """Text of the model card."""
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
    absent = "".join(f", {part}=None" for part in network.missing)
    given = (
        "It holds no text encoder: call it with prompt_embeds and pooled_prompt_embeds.\n\n"
        if absent
        else ""
    )
    load = f"    diffusers.{network.pipeline}.from_pretrained(FOLDER{absent})"
    return (
        f"# {config.name}\n\nA `{network.pipeline}` trained by lpl-pretrain. "
        f"{given}\n\n{load}\n\n{listed}\n"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
