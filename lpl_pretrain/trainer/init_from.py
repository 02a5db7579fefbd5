"""Initial weights of a run from what `init_from` names: a run, a file, or a diffusers folder.

The log says how many parameters were loaded and which were not.  A parameter that is missing,
unknown or of another shape is an error unless `init_from.allow_mismatch` names it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lpl_pretrain.checkpoint.weights import read_weights
from lpl_pretrain.config.check import run_identity
from lpl_pretrain.config.init_from import InitConfig, diffusers_files
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.strict_json import JSONError, read_json
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.errors import CheckpointError, ConfigError
from lpl_pretrain.models import convert_dit
from lpl_pretrain.models.registry import MODELS
from lpl_pretrain.runtime.log import log

State = dict[str, Tensor]
MAX_LISTED = 10
CONVERTERS = {
    spec.diffusers.class_name: spec.diffusers.from_diffusers
    for spec in MODELS.values()
    if spec.diffusers is not None
}
"""Converters by class of the network in diffusers."""
SHAPE_HINTS = {
    "x_embedder": "another number of latent channels, or another patch_size",
    "y_embedder": "another number of classes",
    "final_layer.linear": "another number of latent channels, or learned_sigma",
    "text_embedder": "other text encoders",
    "pooled_embedder": "other pooled vectors",
    "blocks": "another width or depth",
}
"""Prefix of a parameter's name -> likely reason why its shape differs."""


def load_init_from(init: InitConfig, model: Denoiser) -> None:
    """Overwrite the parameters of `model` in place.  Not collective.

    Raises ConfigError or CheckpointError.
    """
    state, source = read_initial(init, model)
    own = dict(model.named_parameters())
    missing = [name for name in own if name not in state]
    reshaped = [name for name in own if name in state and state[name].shape != own[name].shape]
    unknown = [name for name in state if name not in own]
    differing = [
        name
        for name in (*missing, *reshaped, *unknown)
        if not name.startswith(init.allow_mismatch or ("\0",))
    ]
    if differing:
        problems = dict.fromkeys(missing, "missing")
        problems |= dict.fromkeys(unknown, "not in this model")
        problems |= {
            name: f"{tuple(state[name].shape)}, wanted {tuple(own[name].shape)}"
            for name in reshaped
        }
        lines = [f"  {name}: {problems[name]}" for name in differing[:MAX_LISTED]]
        more = f"\n  and {len(differing) - MAX_LISTED} more" if len(differing) > MAX_LISTED else ""
        raise CheckpointError(
            f"{source} does not fit this model in {len(differing)} parameters "
            f"({likely_cause(differing, state)}):\n"
            + "\n".join(lines)
            + more
            + "\nchange the model section, or allow it by name: init_from.allow_mismatch=[...]"
        )
    for name in own.keys() - {*missing, *reshaped}:
        own[name].data.copy_(state[name])
    kept = sorted({*missing, *reshaped})
    log.info("initial weights: %d of %d parameters from %s", len(own) - len(kept), len(own), source)
    if kept or unknown:
        log.info(
            "kept fresh: %s; not used: %s", ", ".join(kept) or "none", ", ".join(unknown) or "none"
        )


def read_initial(init: InitConfig, model: Denoiser) -> tuple[State, str]:
    """Weights by this project's parameter names, and their source for messages.

    Raises ConfigError or CheckpointError.
    """
    if init.run is not None:
        run_dir = RunDir(Path(init.run))
        state, record = read_weights(run_dir, init.weights, init.step, identity_of(run_dir))
        return state, f"{init.run} step {record['step']} {init.weights}"
    if init.file is not None:
        return convert_dit.from_published(
            read_tensors(Path(init.file), "init_from.file")
        ), init.file
    return read_diffusers(Path(init.diffusers or ""), model)


def identity_of(run_dir: RunDir) -> str | None:
    """Identity of a run's configuration; None if this version cannot read the configuration."""
    try:
        return run_identity(load_run_config(run_dir))
    except ConfigError:
        return None


def read_tensors(path: Path, key: str) -> State:
    """Tensors of a safetensors file.  Raises CheckpointError if unreadable or not finite."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{key}={path}: cannot be read as safetensors: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{key}={path}: {name} is {tensor.dtype}, or holds NaN or infinity: wanted "
                "finite weights"
            )
    return tensors


def read_diffusers(folder: Path, model: Denoiser) -> tuple[State, str]:
    """Weights of a diffusers folder, converted, and the folder; ConfigError if settings differ."""
    try:
        settings = read_json(folder / "config.json")
    except JSONError as error:
        raise ConfigError(f"init_from.diffusers: {error}") from None
    name = settings.get("_class_name") if isinstance(settings, dict) else None
    if not isinstance(name, str) or name not in CONVERTERS:
        raise ConfigError(
            f"init_from.diffusers={folder}: is a {name}, wanted one of {', '.join(CONVERTERS)}"
        )
    theirs: State = {}
    for path in diffusers_files(folder):
        theirs |= read_tensors(path, "init_from.diffusers")
    try:
        section, state = CONVERTERS[name](settings, theirs)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"init_from.diffusers={folder}: {error}") from None
    except Exception as error:  # any kind: settings or tensors may be those of another class
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ConfigError(
            f"init_from.diffusers={folder}: cannot be converted as a {name} ({reason})"
        ) from None
    if section is None:
        return state, str(folder)
    not_compared = {"size", "mlp_ratio", "position_side"}
    configured = model.config.model_dump(exclude=not_compared)
    # the kind is compared first: another kind explains all other differences
    stored = {"kind": section.kind, **section.model_dump(exclude=not_compared)}
    for key, value in stored.items():
        if configured.get(key) != value:
            raise ConfigError(
                f"init_from.diffusers={folder}: has {key}={value}, model.{key} is "
                f"{configured.get(key)}: set it so"
            )
    return state, str(folder)


def likely_cause(differing: list[str], state: State) -> str:
    """Hint for the error message, from the names of the parameters that differ."""
    if any(name.startswith("transformer_blocks.") for name in state):
        return "these are diffusers' names: use init_from.diffusers with the folder"
    prefixes = {name.split(".")[0] for name in state}
    if len(prefixes) == 1:
        return f"all names begin with {prefixes.pop()!r}: take the dictionary inside it"
    for prefix, hint in SHAPE_HINTS.items():
        if any(name.startswith(prefix) for name in differing):
            return f"likely {hint}"
    return "likely another kind of model"
