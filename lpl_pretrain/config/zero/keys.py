"""Every key of a DeepSpeed JSON: type, range, DeepSpeed's default, stages, or why it is refused.

Names, types and defaults are those of DeepSpeed 0.19.8; a test compares them with the installed
version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Union

STAGES = (0, 1, 2, 3)
INT64_MAX = 2**63 - 1
MAX_BUFFER_ELEMENTS = 10**11
"""Largest size of buffers that DeepSpeed allocates whole; more than any device holds."""


@dataclass(frozen=True, slots=True)
class Key:
    wanted: str
    """Description for messages."""
    accepts: Callable[[Any], bool]
    default: Any
    """DeepSpeed's."""
    stages: tuple[int, ...] = STAGES
    """Stages in which another value than the default has an effect."""
    integer: bool = False
    """Whether 5e8 means 500000000."""
    refused: str = ""
    """Reason why only the default can be used; such a key is not passed on to DeepSpeed."""


Keys = dict[str, Union[Key, "Keys"]]
"""A table of a JSON object; objects inside it are tables."""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same(value: Any, default: Any) -> bool:
    """Equal, and of the same kind: 5e8 is 500000000, but true is not 1."""
    return (
        type(value) is type(default) or (is_number(value) and is_number(default))
    ) and value == default


def flag(default: bool | None, stages: tuple[int, ...] = STAGES) -> Key:
    optional = default is None
    wanted = "true, false or null" if optional else "true or false"
    return Key(
        wanted,
        lambda value: isinstance(value, bool) or (optional and value is None),
        default,
        stages,
    )


def whole(
    default: int | None, least: int, most: int = INT64_MAX, stages: tuple[int, ...] = STAGES
) -> Key:
    """A whole number; also as JSON files often write it, 5e8."""

    def accepts(value: Any) -> bool:
        if value is None:
            return default is None
        return is_number(value) and least <= value <= most and value == int(value)

    wanted = f"a whole number from {least} to {most}" + (" or null" if default is None else "")
    return Key(wanted, accepts, default, stages, integer=True)


def number(default: float, least: float, most: float) -> Key:
    return Key(
        f"a number from {least:g} to {most:g}",
        lambda v: is_number(v) and least <= v <= most,
        default,
    )


def choice(default: str | None, *values: str | None) -> Key:
    wanted = " or ".join("null" if value is None else repr(value) for value in values)
    return Key(wanted, lambda value: any(same(value, one) for one in values), default)


def text(default: str | None = None) -> Key:
    return Key(
        "a string or null",
        lambda value: value is None or (isinstance(value, str) and value.isprintable()),
        default,
    )


def names(default: tuple[str, ...] | None = (), stages: tuple[int, ...] = STAGES) -> Key:
    return Key(
        "a list of strings",
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
        None if default is None else list(default),
        stages,
    )


def refused(default: Any, why: str) -> Key:
    return Key(
        "its default", lambda value: same(value, default) or value is None, default, refused=why
    )


NVME = "it is for offload to NVMe, which needs an operator compiled on the machine"
COMPILED = "it needs an Adam that DeepSpeed compiles on the spot"
REMOVED = "DeepSpeed 0.19 has removed it"
OLD_OFFLOAD = "DeepSpeed's old name of {}"

OFFLOAD_PARAM: Keys = {
    "device": choice("none", "cpu", "none"),
    "nvme_path": refused(None, NVME),
    "buffer_count": refused(5, NVME),
    "buffer_size": refused(100_000_000, NVME),
    "max_in_cpu": refused(1_000_000_000, NVME),
    "pin_memory": flag(True),
}
OFFLOAD_OPTIMIZER: Keys = {
    "device": choice("none", "cpu", "none"),
    "nvme_path": refused(None, NVME),
    "buffer_count": refused(4, NVME),
    "pin_memory": flag(True),
    "pipeline_read": refused(False, NVME),
    "pipeline_write": refused(False, NVME),
    "fast_init": refused(False, NVME),
    "ratio": refused(1.0, COMPILED),
    "super_offload": refused(False, COMPILED),
    "cpuadam_cores_perc": refused(0.8, COMPILED),
}
LEAF_MODULES: Keys = {"classes": names(None), "names": names(), "name_suffixes": names()}

STAGE_3: dict[str, Key] = {
    "prefetch_bucket_size": whole(50_000_000, 0),
    "param_persistence_threshold": whole(100_000, 0),
    "model_persistence_threshold": whole(INT64_MAX, 0),
    "max_live_parameters": whole(1_000_000_000, 0),
    "max_reuse_distance": whole(1_000_000_000, 0),
    "gather_16bit_weights_on_model_save": flag(False),
    "module_granularity_threshold": refused(
        0, "backward fails under it: gradients meet parameters that are released"
    ),
    "use_all_reduce_for_fetch_params": flag(False),
    "allgather_sequential": flag(False),
}
"""DeepSpeed takes each of these with `stage3_` before it, and without."""

ZERO: Keys = {
    "stage": Key(
        f"one of {STAGES}", lambda value: is_number(value) and value in STAGES, 0, integer=True
    ),
    "contiguous_gradients": flag(True),
    "reduce_scatter": flag(True),
    "reduce_bucket_size": whole(500_000_000, 1, MAX_BUFFER_ELEMENTS),
    "use_multi_rank_bucket_allreduce": flag(True),
    "allgather_partitions": flag(True),
    "allgather_bucket_size": whole(500_000_000, 2),
    "overlap_comm": flag(None),
    "compute_grad_norm": refused(
        True, "the norm is needed for clipping and for the non-finite check"
    ),
    "load_from_fp32_weights": flag(True),
    "elastic_checkpoint": flag(False),
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": refused(None, "it updates some parameters later than others"),
    "sub_group_size": whole(1_000_000_000, 0, stages=(3,)),
    "cpu_offload": refused(None, OLD_OFFLOAD.format("offload_optimizer")),
    "cpu_offload_param": refused(None, OLD_OFFLOAD.format("offload_param")),
    "cpu_offload_use_pin_memory": refused(
        None, OLD_OFFLOAD.format("pin_memory in offload_optimizer")
    ),
    **{f"stage3_{name}": replace(key, stages=(3,)) for name, key in STAGE_3.items()},
    **{name: replace(key, stages=(3,)) for name, key in STAGE_3.items()},
    "stage3_gather_fp16_weights_on_model_save": refused(
        False, "an old name of stage3_gather_16bit_weights_on_model_save"
    ),
    "ignore_unused_parameters": flag(True),
    "legacy_stage1": refused(False, REMOVED),
    "round_robin_gradients": refused(
        False, "it shuffles the flat buffer that checkpoints are read from"
    ),
    "parameter_alignment": flag(False),
    "zero_hpz_partition_size": refused(1, "it keeps a second partition of every parameter"),
    "zero_quantized_weights": refused(False, "it rounds weights"),
    "zero_quantized_nontrainable_weights": refused(False, "it rounds weights"),
    "zero_quantized_gradients": refused(False, "it rounds gradients"),
    "memory_efficient_linear": flag(True, (3,)),
    "pipeline_loading_checkpoint": flag(False, (3,)),
    "override_module_apply": flag(True, (3,)),
    "log_trace_cache_warnings": flag(False, (3,)),
    "enable_sanity_checks": flag(False),
    "save_muon_momentum_buffer_in_memory": refused(False, "Muon does not run under ZeRO"),
    "leaf_module": LEAF_MODULES,
    # of earlier versions, which DeepSpeed 0.19.8 refuses whatever they say
    "mics_shard_size": refused(-1, "its shards are not those of the world"),
    "mics_hierarchical_params_gather": refused(False, REMOVED),
    "zeropp_loco_param": refused(None, REMOVED),
}
"""Keys of zero_optimization."""

TABLE_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,), "leaf_module": (3,)}
"""Objects inside zero_optimization -> stages that have them."""
NULLABLE = {"offload_optimizer", "offload_param", "leaf_module", "aio"}
"""Objects that may be null."""

TUNING: Keys = {
    "zero_optimization": ZERO,
    "aio": {
        "block_size": whole(1_048_576, 1),
        "queue_depth": whole(8, 1),
        "intra_op_parallelism": whole(1, 1),
        "single_submit": flag(False),
        "overlap_events": flag(True),
        "use_gds": refused(False, NVME),
    },
    "comms_logger": {
        "enabled": flag(False),
        "prof_all": flag(True),
        "prof_ops": names(),
        "verbose": flag(False),
        "debug": flag(False),
    },
    "flops_profiler": {
        "enabled": flag(False),
        "recompute_fwd_factor": number(0.0, 0.0, 1e6),
        "profile_step": whole(1, 1),
        "module_depth": whole(-1, -1),
        "top_modules": whole(1, 1),
        "detailed": flag(True),
        "output_file": text(),
    },
    "wall_clock_breakdown": flag(False),
    "memory_breakdown": flag(False),
    "steps_per_print": whole(None, 1),
    "dump_state": flag(False),
    "disable_allgather": flag(False),
    "log_level": choice(None, "debug", "info", "warning", "error", "critical", None),
}
"""Keys of the file that are accepted."""

NO_COUNTERPART = "nothing: "
MEAN = NO_COUNTERPART + "gradients are always the mean over ranks"
NOT_HERE = NO_COUNTERPART + "it does not exist here"
OWNED = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch (accumulation follows from it)",
    "managed_gradient_accumulation": "batch (accumulation follows from it)",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_steps and optimizer.lr_schedule",
    "fp16": "parallel.precision",
    "bf16": "parallel.precision",
    "bfloat16": "parallel.precision",
    "amp": "parallel.precision",
    "torch_autocast": "parallel.precision",
    "data_types": "parallel.precision",
    "communication_data_type": "parallel.precision",
    "seq_parallel_communication_data_type": "parallel.precision",
    "prescale_gradients": MEAN,
    "gradient_predivide_factor": MEAN,
    "gradient_allreduce_op": MEAN,
    "zero_allow_untested_optimizer": NO_COUNTERPART + "it is always allowed",
    "zero_force_ds_cpu_optimizer": NO_COUNTERPART
    + "the optimizer is always torch's, offloaded or not",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
    "nebula": "checkpoint",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "compile": "parallel.compile",
    "wandb": "log.wandb",
    "tensorboard": "log",
    "csv_monitor": "log",
    "comet": "log",
    "timers": "log (times and throughput are in metrics.jsonl)",
    "dataloader_drop_last": "data (there are no partial batches)",
    "data_efficiency": "data",
    "curriculum_learning": NOT_HERE,
    "elasticity": NO_COUNTERPART
    + "a run goes on with any number of processes that divides its batch",
    "tensor_parallel": NOT_HERE,
    "expert_parallel": NOT_HERE,
    "pipeline": NOT_HERE,
    "hybrid_engine": NOT_HERE,
    "autotuning": NOT_HERE,
    "compression_training": NOT_HERE,
    "weight_quantization": NOT_HERE,
    "quantize_training": NOT_HERE,
    "progressive_layer_drop": NOT_HERE,
    "sparse_attention": NOT_HERE,
    "sparse_gradients": NOT_HERE,
    "eigenvalue": NOT_HERE,
    "graph_harvesting": NOT_HERE,
    "use_data_before_expert_parallelism": NOT_HERE,
    "disable_python_gc": NOT_HERE,
    "vocabulary_size": NOT_HERE,
}
"""Key of the file that is refused -> who says it instead."""
