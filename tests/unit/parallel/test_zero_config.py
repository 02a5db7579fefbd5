"""A DeepSpeed JSON tunes the engine; whatever else it says is refused, everything at once, and
before torch is imported.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.schema import ParallelConfig, TrainConfig
from lpl_pretrain.config.zero import read_zero_config, zero_settings
from lpl_pretrain.config.zero.check import BUILTIN
from lpl_pretrain.config.zero.foreign import adapt_file
from lpl_pretrain.config.zero.keys import (
    LEAF_MODULES,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    OWNED,
    STAGE_3,
    TUNING,
    ZERO,
    Key,
    same,
)
from lpl_pretrain.errors import ConfigError
from tests.support.configs import train_config

SHIPPED = sorted((Path(__file__).parents[3] / "configs" / "zero").glob("*.json"))


def refusal(tmp_path, content) -> str:
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_zero_config(path)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_accepted(path):
    assert read_zero_config(path)["zero_optimization"]["stage"] == int(path.stem[4])


def test_every_conflict_is_listed_with_who_decides(tmp_path):
    message = refusal(
        tmp_path,
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW"},
            "scheduler": {},
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "nvme"},
                "round_robin_gradients": True,
            },
        },
    )
    assert ": 9 keys cannot be used" in message
    for key, owner in {
        "train_batch_size": "batch.global_batch_size",
        "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
        "gradient_clipping": "optimizer.max_grad_norm",
        "bf16": "parallel.precision",
        "optimizer": "optimizer",
        "gradient_accumulation_steps": "batch",
    }.items():
        assert f"  {key}: set by {owner}" in message
    assert "zero_optimization.offload_optimizer.device: found 'nvme', wanted 'cpu'" in message
    assert "zero_optimization.round_robin_gradients: it shuffles" in message


def test_defaults_written_out_are_no_conflict(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "none"},
                    "zero_hpz_partition_size": 1,
                    "round_robin_gradients": False,
                    "zero_quantized_weights": False,
                }
            }
        )
    )
    assert read_zero_config(path)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    "content, words",
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "found 4, wanted one of \\(0, 1, 2, 3\\)"),
        ({"zero_optimization": {"stage": True}}, "stage: found True, wanted one of"),
        ({"zero_optimization": {"stage": "2"}}, "stage: found '2', wanted one of"),
        ({"zero_optimization": True}, "found True"),
        ({}, "found None"),
        ([1], "found a JSON list"),
        ("{", "not JSON"),
    ],
)
def test_what_is_no_zero_configuration(tmp_path, content, words):
    assert re.search(words, refusal(tmp_path, content))


def test_absent_file(tmp_path):
    with pytest.raises(
        ConfigError, match="parallel.zero_config=.*No such file.*configs/zero/zero2.json"
    ):
        read_zero_config(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "stage, key, asked, complaint",
    [
        (
            2,
            "offload_param",
            {"device": "cpu"},
            "offload_param: stage 2 has none, it is for stages 3",
        ),
        (
            0,
            "offload_optimizer",
            {"device": "cpu"},
            "offload_optimizer: stage 0 has none, it is for stages 1, 2, 3",
        ),
        (
            3,
            "offload_optimizer",
            {"device": "cpu", "ratio": 0.5},
            "offload_optimizer.ratio: it needs an Adam that DeepSpeed compiles",
        ),
        (
            3,
            "offload_optimizer",
            {"device": "cpu", "super_offload": True},
            "offload_optimizer.super_offload: it needs an Adam",
        ),
        (3, "offload_param", True, "offload_param: found True, wanted an object such as"),
        (3, "cpu_offload", True, "cpu_offload: DeepSpeed's old name of offload_optimizer"),
    ],
)
def test_offload_to_the_host_and_nothing_else(tmp_path, stage, key, asked, complaint):
    assert complaint in refusal(tmp_path, {"zero_optimization": {"stage": stage, key: asked}})


ROOT = Path(__file__).parents[3]


def stage(number, **keys):
    return {"zero_optimization": {"stage": number, **keys}}


@pytest.mark.parametrize(
    "content, words",
    [
        (
            stage(2, reduce_bucket_sise=5),
            "zero_optimization.reduce_bucket_sise: unknown key; did you mean 'reduce_bucket_size'?",
        ),
        (
            stage(2, reduce_bucket_size=-1),
            "reduce_bucket_size: found -1, wanted a whole number from 1 to 100000000000",
        ),
        (stage(2, reduce_bucket_size=1.5), "reduce_bucket_size: found 1.5, wanted a whole number"),
        (
            stage(2, reduce_bucket_size=True),
            "reduce_bucket_size: found True, wanted a whole number",
        ),
        (stage(2, reduce_bucket_size=10**30), "reduce_bucket_size: found 1000"),
        (
            stage(2, reduce_bucket_size="5e8"),
            "reduce_bucket_size: found '5e8', wanted a whole number",
        ),
        (stage(2, reduce_bucket_size=None), "reduce_bucket_size: found None"),
        (
            stage(2, reduce_bucket_size="auto"),
            "found 'auto', which only Hugging Face fills in .DeepSpeed's default is 500000000",
        ),
        (stage(2, overlap_comm="true"), "overlap_comm: found 'true', wanted true, false or null"),
        (stage(2, overlap_comm=1), "overlap_comm: found 1, wanted true"),
        (
            stage(2, allgather_bucket_size=5),
            "allgather_bucket_size: found 5, wanted an even number",
        ),
        (stage(2, sub_group_size=5), "sub_group_size: stage 2 has none, it is for stages 3"),
        (stage(2, stage3_max_live_parameters=5), "stage3_max_live_parameters: stage 2 has none"),
        (stage(2, leaf_module={"names": ["x"]}), "leaf_module: stage 2 has none"),
        (stage(2, zenflow={}), "zenflow: it updates some parameters later"),
        (stage(2, mics_shard_size=4), "mics_shard_size: its shards are not those of the world"),
        (stage(1, compute_grad_norm=False), "compute_grad_norm: the norm is needed"),
        (stage(1, legacy_stage1=True), "legacy_stage1: DeepSpeed 0.19 has removed it"),
        (
            stage(3, stage3_module_granularity_threshold=9),
            "stage3_module_granularity_threshold: backward fails under it",
        ),
        (
            stage(3, offload_param={"device": "cpu", "pin_memory": "yes"}),
            "offload_param.pin_memory: found 'yes', wanted true or",
        ),
        (
            stage(3, offload_param={"divice": "cpu"}),
            "offload_param.divice: unknown key; did you mean 'device'",
        ),
        (
            stage(3, offload_param={"device": "cpu", "nvme_path": "/x"}),
            "offload_param.nvme_path: it is for offload to NVMe",
        ),
        (
            stage(3, prefetch_bucket_size=1, stage3_prefetch_bucket_size=1),
            "prefetch_bucket_size: is the same as stage3_prefetch_bucket_size, which is there too",
        ),
        (
            stage(3, stage3_allgather_sequential=True, stage3_prefetch_bucket_size=9),
            "stage3_prefetch_bucket_size: allgather_sequential switches prefetching off",
        ),
        (
            {**stage(3), "flops_profiler": {"enabled": True}},
            "flops_profiler.enabled: DeepSpeed's profiler fails under stage 3",
        ),
        (
            {**stage(2), "steps_per_print": 0},
            "steps_per_print: found 0, wanted a whole number from 1 to .* or null",
        ),
        ({**stage(2), "aio": {"block_size": "1M"}}, "aio.block_size: found '1M'"),
        (
            {**stage(2), "comms_logger": None},
            "comms_logger: found None, wanted an object with enabled, prof_all",
        ),
        (
            {**stage(2), "comms_logger": {"prof_ops": "all_reduce"}},
            "comms_logger.prof_ops: found 'all_reduce', wanted a list",
        ),
        ({**stage(2), "log_level": "loud"}, "log_level: found 'loud', wanted 'debug' or"),
        (
            {**stage(2), "wall_clock_breakdown": "false"},
            "wall_clock_breakdown: found 'false', wanted true or false",
        ),
        (
            '{"zero_optimization": {"stage": 1, "stage": 2}}',
            "zero_optimization.stage: is there twice; keep one",
        ),
        (
            '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}',
            "zero_optimization: is there twice",
        ),
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": NaN}}',
            "reduce_bucket_size: found nan, wanted a finite",
        ),
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e999}}',
            "reduce_bucket_size: found inf, wanted a finite",
        ),
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": ' + "9" * 9000 + "}}",
            "found inf",
        ),
        (
            '{"zero_optimization": {"stage": 1, "\\u001b[31m\\ud800": 1}}',
            r"'\\x1b\[31m\\ud800': unknown key",
        ),
        ("[" * 100_000, "nested more than 16 levels deep"),
        ('{"a":' * 50 + "1" + "}" * 50, "nested more than 16 levels deep"),
    ],
)
def test_every_mistake_is_named_with_key_value_and_remedy(tmp_path, content, words):
    message = refusal(tmp_path, content)
    assert re.search(words, message) and len(message) < 600
    assert message.startswith(
        (f"{tmp_path / 'zero.json'}: ", f"parallel.zero_config='{tmp_path / 'zero.json'}': ")
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b"\xff\xfe{\0}\0", "begins with a byte order mark"),
        (b'{"\0": 1}', "holds a NUL byte at position 2"),
        (b'{"\xe9": 1}', "not UTF-8: byte 0xe9 at position 2"),
        (b" " * (1 << 20) + b"{}", "has more than 1048576 bytes"),
        (b"", "not JSON"),
    ],
)
def test_bytes_that_are_no_json(tmp_path, content, words):
    (tmp_path / "zero.json").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_zero_config(tmp_path / "zero.json")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is no regular file"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_zero_config(path)


def test_at_most_twenty_problems_are_listed(tmp_path):
    message = refusal(
        tmp_path, {**stage(2), **{f"key_{number}_" + "x" * 500: "y" * 5000 for number in range(30)}}
    )
    assert (
        ": 30 keys cannot be used" in message
        and message.count("unknown key") == 20
        and message.endswith("and 10 more")
    )


def test_a_long_value_is_shortened(tmp_path):
    assert len(refusal(tmp_path, stage(2, overlap_comm="y" * 100_000))) < 300


def test_numbers_as_deepspeed_files_write_them_and_keys_that_say_nothing(tmp_path):
    (tmp_path / "zero.json").write_text(
        json.dumps(
            {
                **stage(
                    3.0,
                    reduce_bucket_size=5e8,
                    sub_group_size=1e9,
                    mics_shard_size=-1,
                    cpu_offload=False,
                    overlap_comm=None,
                ),
                "steps_per_print": 1e1,
            }
        )
    )
    found = read_zero_config(tmp_path / "zero.json")
    assert found == {
        **stage(3, reduce_bucket_size=500_000_000, sub_group_size=1_000_000_000, overlap_comm=None),
        "steps_per_print": 10,
    }
    assert all(
        type(found["zero_optimization"][key]) is int
        for key in ("stage", "reduce_bucket_size", "sub_group_size")
    )


def spellings(fields) -> dict:
    """Every name that a pydantic model of DeepSpeed takes -> its field."""
    return {name: field for key, field in fields.items() for name in (key, field.alias) if name}


def bounds(field) -> dict:
    return {
        name: getattr(rule, name)
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(rule, name)
    }


@pytest.mark.parametrize(
    "ours, module, name",
    [
        (ZERO, "zero.config", "DeepSpeedZeroConfig"),
        (OFFLOAD_PARAM, "zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
        (OFFLOAD_OPTIMIZER, "zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
        (LEAF_MODULES, "zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig"),
        (TUNING["comms_logger"], "../comm.config", "CommsLoggerConfig"),
    ],
)
def test_the_tables_are_those_of_the_installed_deepspeed(ours, module, name):
    """Names with aliases, defaults, lower bounds."""
    pytest.importorskip("deepspeed")
    path = f"deepspeed.{module[3:]}" if module.startswith("../") else f"deepspeed.runtime.{module}"
    theirs = spellings(getattr(__import__(path, fromlist=[name]), name).model_fields)
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    removed = set(_REMOVED_ZERO_CONFIG_KEYS) if ours is ZERO else set()
    assert set(ours) - removed == set(theirs) and removed <= set(ours)
    for key, field in theirs.items():
        rule = ours[key]
        if not isinstance(rule, Key):
            continue
        default = field.get_default(call_default_factory=True)
        if key != "stage" and rule.default is not None:
            assert same(rule.default, default), key
        assert rule.accepts(default), key
        limits = bounds(field)
        if rule.integer and limits:
            assert not rule.accepts(limits["ge"] - 1 if "ge" in limits else limits["gt"]), key


def test_every_top_level_key_of_the_installed_deepspeed_is_known():
    """Keys that DeepSpeed's configuration reads by a constant of its own."""
    constants = pytest.importorskip("deepspeed.runtime.constants")
    config = pytest.importorskip("deepspeed.runtime.config")
    source = Path(config.__file__).read_text()
    read = set(re.findall(r"get_scalar_param\(\s*param_dict,\s*([A-Z0-9_]+)", source)) | {
        "OPTIMIZER",
        "SCHEDULER",
        "DATA_TYPES",
    }
    names = {getattr(constants, name) for name in read if hasattr(constants, name)}
    assert len(names) > 15 and names <= OWNED.keys() | TUNING.keys()
    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= OWNED.keys()


def test_stage_3_keys_are_known_under_both_names():
    assert {f"stage3_{name}" for name in STAGE_3} | STAGE_3.keys() <= ZERO.keys()


def test_builtin_tuning_is_that_of_the_examples():
    for path in sorted(BUILTIN.glob("*.json")):
        assert path.read_text() == (ROOT / "configs" / "zero" / path.name).read_text()
    for number in (1, 2, 3):
        parallel = ParallelConfig(strategy=f"zero{number}")
        assert (
            parallel.strategy.is_zero
            and zero_settings(parallel)["zero_optimization"]["stage"] == number
        )
        assert zero_settings(parallel) == read_zero_config(ROOT / f"configs/zero/zero{number}.json")


def test_builtin_tuning_is_installed_with_the_package():
    assert "config/zero/builtin/*.json" in (ROOT / "setup.cfg").read_text()
    assert len(list(BUILTIN.glob("*.json"))) == 3


def test_a_strategy_and_a_file_of_another_stage(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(stage(3)))
    assert zero_settings(ParallelConfig(strategy="zero3", zero_config=str(path))) == stage(3)
    with pytest.raises(
        ConfigError,
        match="strategy=zero2 with .*tuned.json.*stage=3, wanted 2: set parallel.strategy=zero3",
    ):
        zero_settings(ParallelConfig(strategy="zero2", zero_config=str(path)))
    path.write_text(json.dumps(stage(0)))
    with pytest.raises(ConfigError, match="stage=0, wanted 2: set parallel.strategy=zero, or"):
        zero_settings(ParallelConfig(strategy="zero2", zero_config=str(path)))
    with pytest.raises(
        ValueError, match="strategy='ddp': a DeepSpeed JSON is for the strategies zero"
    ):
        ParallelConfig(strategy="ddp", zero_config=str(path))
    with pytest.raises(ValueError, match="strategy='zero1': DeepSpeed keeps float32 masters"):
        ParallelConfig(strategy="zero1", precision="fp64")
    with pytest.raises(
        ValueError, match="shard_size=2 with strategy='zero3': this key is for strategy fsdp2"
    ):
        ParallelConfig(strategy="zero3", shard_size=2)


HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": "true",
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_sise": "1000",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "steps_per_print": 2000,
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "activation_checkpointing": {"partition_activations": True},
    "wandb": {"enabled": True, "team": "us", "project": "them"},
    "monitoring": 1,
}


def zero_config(tmp_path, content, *arguments):
    (tmp_path / "theirs.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "lpl_pretrain",
        "zero-config",
        str(tmp_path / "theirs.json"),
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_foreign_file_is_adapted_and_what_was_taken_out_is_named(tmp_path):
    done = zero_config(tmp_path, HUGGING_FACE)
    (tmp_path / "ours.json").write_text(done.stdout)
    assert done.returncode == 0 and not re.search(r"\| +(torch|deepspeed)$", done.stderr, re.M), (
        "no torch"
    )
    assert read_zero_config(tmp_path / "ours.json") == {
        **stage(
            3,
            offload_optimizer={"device": "cpu", "pin_memory": True},
            overlap_comm=True,
            contiguous_gradients=True,
            sub_group_size=1_000_000_000,
            stage3_prefetch_bucket_size=1000,
            stage3_gather_16bit_weights_on_model_save=True,
        ),
        "steps_per_print": 2000,
    }
    for line in (
        "train_batch_size = 64: write batch.global_batch_size=64",
        "train_micro_batch_size_per_gpu = 8: write batch.micro_batch_size=8",
        "gradient_clipping = 1.0: write optimizer.max_grad_norm=1.0",
        "bf16 = {'enabled': True}: write parallel.precision=bf16",
        "optimizer.kind=adamw optimizer.lr=3e-05 optimizer.betas=[0.8,0.999] optimizer.eps=1e-08 "
        "optimizer.weight_decay=3e-07",
        "write optimizer.warmup_steps=500 optimizer.lr_schedule=constant optimizer.lr=3e-05",
        "activation_checkpointing = {'partition_activations': True}: write "
        "parallel.activation_checkpointing=blocks",
        "write log.wandb.mode=online log.wandb.project=them log.wandb.entity=us",
        "gradient_accumulation_steps = 'auto': follows from batch.global_batch_size",
        "fp16 = {'enabled': 'auto', 'loss_scale': 0, 'loss_scale_window': 1000}: set by "
        "parallel.precision",
        "zero_optimization.reduce_bucket_size = 'auto': found 'auto', which only Hugging "
        "Face fills in",
        "zero_optimization.offload_optimizer.device = 'nvme': changed to 'cpu'",
        "zero_optimization.contiguous_gradients = 'true': changed to True",
        "zero_optimization.stage3_prefetch_bucket_sise = '1000': renamed to "
        "stage3_prefetch_bucket_size",
        "monitoring = 1: DeepSpeed 0.19.8 has no such key",
        "use it as parallel.strategy=zero parallel.zero_config=FILE (stage 3)",
    ):
        assert line in done.stderr, line


def test_what_is_written_instead_loads(tmp_path):
    """Every `key=value` of the report is one that a configuration takes, and means what the file
    said.
    """
    (tmp_path / "theirs.json").write_text(json.dumps(HUGGING_FACE))
    (tmp_path / "run.yaml").write_text(
        json.dumps(train_config(parallel__strategy="zero3").model_dump(mode="json"))
    )
    texts = [
        change.text
        for change in adapt_file(tmp_path / "theirs.json").changes
        if change.text.startswith("write ")
    ]
    overrides = [word for text in texts for word in text.removeprefix("write ").split()]
    config = load_config(TrainConfig, tmp_path / "run.yaml", overrides)
    assert (config.batch.global_batch_size, config.batch.micro_batch_size) == (64, 8)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.max_grad_norm) == (
        3e-5,
        (0.8, 0.999),
        1.0,
    )
    assert (
        config.parallel.precision.value,
        config.log.wandb.project,
        config.optimizer.warmup_steps,
    ) == ("bf16", "them", 500)


def test_output_is_a_new_file(tmp_path):
    output = tmp_path / "folder" / "ours.json"
    done = zero_config(
        tmp_path,
        {**stage(2, reduce_bucket_size=50_000_000), "gradient_clipping": 0},
        "--output",
        str(output),
    )
    assert done.returncode == 0 and read_zero_config(output) == stage(
        2, reduce_bucket_size=50_000_000
    )
    assert (
        "write optimizer.max_grad_norm=1e9" in done.stdout
        and f"parallel.zero_config={output} (stage 2)" in done.stdout
    )
    before = output.read_bytes()
    again = zero_config(tmp_path, stage(1), "--output", str(output))
    assert (
        again.returncode == 2
        and "is there already" in again.stderr
        and output.read_bytes() == before
    )
    assert [path.name for path in output.parent.iterdir()] == ["ours.json"]


@pytest.mark.parametrize(
    "content, wanted, change",
    [
        (stage("2"), stage(2), None),
        ({}, stage(0), 'changed to {"stage": 0}'),
        ({"zero_optimization": True}, stage(1), 'changed to {"stage": 1}'),
        (
            stage(2, cpu_offload=True),
            stage(2, offload_optimizer={"device": "cpu"}),
            "changed to offload_optimizer=",
        ),
        (stage(2, offload_param={"device": "cpu"}), stage(2), "stage 2 has none"),
        (
            '\ufeff{"zero_optimization": {"stage": 1, "stage": 2}}',
            stage(2),
            "is there twice; the last one counts",
        ),
        (stage(2, reduce_bucket_size=10**40), stage(2), "wanted a whole number"),
        (
            {**stage(3), "flops_profiler": {"enabled": True}},
            {**stage(3), "flops_profiler": {}},
            "fails under stage 3",
        ),
    ],
)
def test_repairs(tmp_path, content, wanted, change):
    (tmp_path / "theirs.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    adapted = adapt_file(tmp_path / "theirs.json")
    assert adapted.settings == wanted
    assert change is None or any(change in one.text for one in adapted.changes)


def test_a_file_that_says_what_is_built_in_needs_no_file(tmp_path):
    done = zero_config(tmp_path, (ROOT / "configs/zero/zero2.json").read_text())
    assert "use it as parallel.strategy=zero2, whose built-in tuning it is" in done.stderr


@pytest.mark.parametrize("content", [stage(7), stage("auto"), {"zero_optimization": [1]}, [1], "{"])
def test_what_cannot_be_adapted(tmp_path, content):
    (tmp_path / "theirs.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    with pytest.raises(
        ConfigError, match="theirs.json: (1 key must be set by you:|found a JSON list|not JSON)"
    ):
        adapt_file(tmp_path / "theirs.json")
