"""What a DeepSpeed JSON may say: how the ZeRO engine is tuned, never what is trained.

Batch, accumulation, clipping, precision and optimizer belong to the run's own configuration; a JSON that sets them is refused, all
conflicts at once.  So are engine features that round, delay or scatter: under them a rank's part of a parameter is no contiguous
range, or the run is no longer the same run.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from lpl_pretrain.errors import ConfigError

OWNED = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch (accumulation follows from it)",
    "managed_gradient_accumulation": "batch (accumulation follows from it)",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_steps and optimizer.decay",
    "fp16": "parallel.precision",
    "bf16": "parallel.precision",
    "amp": "parallel.precision",
    "torch_autocast": "parallel.precision",
    "data_types": "parallel.precision",
    "communication_data_type": "parallel.precision",
    "prescale_gradients": "nothing: gradients are always the mean over ranks",
    "gradient_predivide_factor": "nothing: gradients are always the mean over ranks",
    "gradient_allreduce_op": "nothing: gradients are always the mean over ranks",
    "zero_allow_untested_optimizer": "nothing: it is always allowed",
    "zero_force_ds_cpu_optimizer": "nothing: the optimizer is always torch's, offloaded or not",
    "checkpoint": "checkpoint",
    "wandb": "log.wandb",
    "tensorboard": "log",
    "csv_monitor": "log",
}
"""Key of the JSON -> who says it instead."""

TUNING = {
    "zero_optimization",
    "aio",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "disable_allgather",
    "log_level",
}

REFUSED = {
    "cpu_offload": "DeepSpeed's old name of offload_optimizer",
    "cpu_offload_param": "DeepSpeed's old name of offload_param",
    "zenflow": "it updates some parameters later than others",
    "round_robin_gradients": "it shuffles the flat buffer that checkpoints are read from",
    "zero_hpz_partition_size": "it keeps a second partition of every parameter",
    "zero_quantized_weights": "it rounds weights",
    "zero_quantized_nontrainable_weights": "it rounds weights",
    "zero_quantized_gradients": "it rounds gradients",
    "mics_shard_size": "its shards are not those of the world",
    "compute_grad_norm": "the norm is needed for clipping and for the non-finite check",
}
"""Key of zero_optimization -> why it cannot be set to anything but its default."""

DEFAULTS: tuple[Any, ...] = (None, False, {}, {"device": "none"})
STAGES = (0, 1, 2, 3)
OFFLOAD = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""Key of zero_optimization -> stages that have it."""


def read_zero_config(path: str | Path) -> dict[str, Any]:
    """The engine's tuning as a dict; ConfigError lists everything in the file that cannot stay."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"parallel.zero_config={str(path)!r}: {error.strerror}; wanted a DeepSpeed JSON file, such as configs/zero/zero2.json"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a JSON {type(content).__name__}, wanted an object like configs/zero/zero2.json")
    zero = content.get("zero_optimization")
    problems = [_top_level_problem(key) for key in content if key not in TUNING]
    if not isinstance(zero, dict) or zero.get("stage") not in STAGES:
        found = zero.get("stage") if isinstance(zero, dict) else zero
        problems.append(f"zero_optimization.stage: found {found!r}, wanted one of {STAGES}")
    if isinstance(zero, dict):
        problems += [f"zero_optimization.{key}: {why}; remove it" for key, why in REFUSED.items() if not _is_default(key, zero)]
        problems += [problem for key in OFFLOAD if not _is_default(key, zero) for problem in _offload_problems(key, zero)]
    if problems:
        raise ConfigError(f"{path}: {len(problems)} keys cannot be used:\n  " + "\n  ".join(problems))
    return content


def _top_level_problem(key: str) -> str:
    if key in OWNED:
        return f"{key}: set by {OWNED[key]} in the run's configuration; remove it here"
    close = difflib.get_close_matches(key, TUNING, n=1)
    return f"{key}: unknown key{f'; did you mean {close[0]!r}?' if close else '; remove it'}"


def _offload_problems(key: str, zero: dict[str, Any]) -> list[str]:
    """Offload to the host's memory works; what else DeepSpeed can do with it needs operators that it compiles on the spot."""
    asked, stage, path = zero[key], zero.get("stage"), f"zero_optimization.{key}"
    if not isinstance(asked, dict):
        return [f'{path}: found {asked!r}, wanted an object such as {{"device": "cpu", "pin_memory": true}}']
    problems = []
    if asked.get("device") != "cpu":
        problems.append(
            f"{path}.device: found {asked.get('device')!r}, wanted 'cpu' (nvme needs an operator compiled on the machine)"
        )
    if stage in STAGES and stage not in OFFLOAD[key]:
        problems.append(f"{path}: stage {stage} has none, it is for stages {', '.join(map(str, OFFLOAD[key]))}; remove it")
    compiled = [name for name, default in (("ratio", 1.0), ("super_offload", False)) if asked.get(name, default) != default]
    problems += [f"{path}.{name}: it needs an Adam that DeepSpeed compiles on the spot; remove it" for name in compiled]
    return problems


def _is_default(key: str, zero: dict[str, Any]) -> bool:
    default = {"zero_hpz_partition_size": 1, "compute_grad_norm": True, "mics_shard_size": -1}.get(key)
    return key not in zero or (zero[key] in DEFAULTS if default is None else zero[key] == default)
