"""A DeepSpeed JSON tunes the engine; whatever else it says is refused, everything at once."""

import json
import re
from pathlib import Path

import pytest

from lpl_pretrain.config.zero import read_zero_config
from lpl_pretrain.errors import ConfigError

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
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}, "round_robin_gradients": True},
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
        ({"zero_optimization": True}, "found True"),
        ({}, "found None"),
        ([1], "found a JSON list"),
        ("{", "not JSON"),
    ],
)
def test_what_is_no_zero_configuration(tmp_path, content, words):
    assert re.search(words, refusal(tmp_path, content))


def test_absent_file(tmp_path):
    with pytest.raises(ConfigError, match="parallel.zero_config=.*No such file.*configs/zero/zero2.json"):
        read_zero_config(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "stage, key, asked, complaint",
    [
        (2, "offload_param", {"device": "cpu"}, "offload_param: stage 2 has none, it is for stages 3"),
        (0, "offload_optimizer", {"device": "cpu"}, "offload_optimizer: stage 0 has none, it is for stages 1, 2, 3"),
        (
            3,
            "offload_optimizer",
            {"device": "cpu", "ratio": 0.5},
            "offload_optimizer.ratio: it needs an Adam that DeepSpeed compiles",
        ),
        (3, "offload_optimizer", {"device": "cpu", "super_offload": True}, "offload_optimizer.super_offload: it needs an Adam"),
        (3, "offload_param", True, "offload_param: found True, wanted an object such as"),
        (3, "cpu_offload", True, "cpu_offload: DeepSpeed's old name of offload_optimizer"),
    ],
)
def test_offload_to_the_host_and_nothing_else(tmp_path, stage, key, asked, complaint):
    assert complaint in refusal(tmp_path, {"zero_optimization": {"stage": stage, key: asked}})
