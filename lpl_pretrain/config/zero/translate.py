"""Keys of a DeepSpeed JSON that our configuration owns, as `key=value` of ours where possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from lpl_pretrain.config.zero.keys import NO_COUNTERPART, OWNED, is_number

NO_CLIPPING = "1e9"
"""optimizer.max_grad_norm has no null; DeepSpeed's 0 clips nothing."""
OPTIMIZERS = {
    "adam": "adamw",
    "adamw": "adamw",
    "fusedadam": "adamw",
    "sgd": "sgd",
    "muon": "adamw",
}
SCHEDULERS = {"warmuplr": "constant", "warmupcosinelr": "cosine", "warmupdecaylr": "cosine"}
NOTES = {
    "gradient_accumulation_steps": "follows from batch.global_batch_size = this x "
    "batch.micro_batch_size x processes",
    "scheduler": "decays that do not exist here become a cosine",
    "optimizer": "Muon does not run under ZeRO",
}


def translate(key: str, value: Any) -> str:
    """Replacement of a key in OWNED: `key=value ...`, or the name of our key that decides it."""
    owner, overrides = OWNED[key], " ".join(_OVERRIDES.get(key, _nothing)(value))
    if not overrides:
        nothing = owner.startswith(NO_COUNTERPART)
        return owner.removeprefix(NO_COUNTERPART) if nothing else NOTES.get(key, f"set by {owner}")
    kind = str(value.get("type", "")).lower() if isinstance(value, dict) else ""
    noted = kind in ("muon", "warmupdecaylr")
    return f"write {overrides}" + (f" ({NOTES[key]})" if noted else "")


def _nothing(value: Any) -> Iterator[str]:
    return iter(())


def _count(name: str) -> Callable[[Any], Iterator[str]]:
    def overrides(value: Any) -> Iterator[str]:
        if _positive(value) and value == int(value):
            yield f"{name}={int(value)}"

    return overrides


def _clipping(value: Any) -> Iterator[str]:
    if _positive(value):
        yield f"optimizer.max_grad_norm={value!r}"
    elif is_number(value) and value == 0:
        yield f"optimizer.max_grad_norm={NO_CLIPPING}"


def _optimizer(value: Any) -> Iterator[str]:
    kind, parameters = _kind_and_parameters(value)
    if kind in OPTIMIZERS:
        yield f"optimizer.kind={OPTIMIZERS[kind]}"
    if _positive(parameters.get("lr")):
        yield f"optimizer.lr={parameters['lr']!r}"
    betas = parameters.get("betas")
    if (
        isinstance(betas, list)
        and len(betas) == 2
        and all(is_number(beta) and 0 <= beta <= 1 for beta in betas)
    ):
        yield f"optimizer.betas=[{betas[0]!r},{betas[1]!r}]"
    if _positive(parameters.get("eps")):
        yield f"optimizer.eps={parameters['eps']!r}"
    decay = parameters.get("weight_decay")
    if _positive(decay) or (is_number(decay) and decay == 0):
        yield f"optimizer.weight_decay={decay!r}"
    yield from _clipping(parameters.get("max_grad_norm"))


def _scheduler(value: Any) -> Iterator[str]:
    kind, parameters = _kind_and_parameters(value)
    yield from _count("optimizer.warmup_steps")(parameters.get("warmup_num_steps"))
    if kind in SCHEDULERS:
        yield f"optimizer.lr_schedule={SCHEDULERS[kind]}"
    yield from _count("steps")(parameters.get("total_num_steps"))
    if _positive(parameters.get("warmup_max_lr")):
        yield f"optimizer.lr={parameters['warmup_max_lr']!r}"


def _precision(name: str) -> Callable[[Any], Iterator[str]]:
    def overrides(value: Any) -> Iterator[str]:
        if isinstance(value, dict) and value.get("enabled") is True:
            yield f"parallel.precision={name}"

    return overrides


def _autocast(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value.get("enabled") is True:
        dtype = str(value.get("dtype", "bfloat16")).removeprefix("torch.")
        found = {
            "bfloat16": "bf16",
            "bf16": "bf16",
            "float16": "fp16",
            "fp16": "fp16",
            "half": "fp16",
        }.get(dtype)
        if found is not None:
            yield f"parallel.precision={found}"


def _wandb(value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or value.get("enabled") is not True:
        return
    yield "log.wandb.mode=online"
    for ours, theirs in (("project", "project"), ("entity", "team")):
        name = value.get(theirs)
        if (
            isinstance(name, str)
            and name.isascii()
            and name.replace("-", "").replace("_", "").isalnum()
        ):
            yield f"log.wandb.{ours}={name}"


def _checkpointing(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield "parallel.activation_checkpointing=blocks"


def _compile(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and True in (value.get("enabled"), value.get("deepcompile")):
        yield "parallel.compile=true"


_OVERRIDES: dict[str, Callable[[Any], Iterator[str]]] = {
    "train_batch_size": _count("batch.global_batch_size"),
    "train_micro_batch_size_per_gpu": _count("batch.micro_batch_size"),
    "gradient_clipping": _clipping,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "fp16": _precision("fp16"),
    "bf16": _precision("bf16"),
    "bfloat16": _precision("bf16"),
    "amp": _precision("fp16"),
    "torch_autocast": _autocast,
    "wandb": _wandb,
    "activation_checkpointing": _checkpointing,
    "compile": _compile,
}


def _positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


def _kind_and_parameters(value: Any) -> tuple[str, dict[str, Any]]:
    """`type` in small letters and `params` of an optimizer's or a scheduler's section."""
    if not isinstance(value, dict):
        return "", {}
    parameters = value.get("params")
    return str(value.get("type", "")).lower(), parameters if isinstance(parameters, dict) else {}
