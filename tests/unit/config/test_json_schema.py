"""Schemas for editors: published ones are current, every file of ours names and fits its schema,
and mistakes that a schema can show are refused by it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lpl_pretrain.cli.main import commands
from lpl_pretrain.config.json_schema import FILE_CLASSES, file_schema, schema_text
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.yaml_reader import parse, read_mapping
from tests.support.json_schema import schema_errors

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FILES = [(kind, path) for kind in FILE_CLASSES for path in sorted(CONFIGS.glob(f"{kind}/*.yaml"))]


def errors(kind: str, value: object) -> list[str]:
    schema = file_schema(kind)
    return schema_errors(value, schema, schema)


@pytest.mark.parametrize("kind", FILE_CLASSES)
def test_published_schemas_are_current(kind):
    path = CONFIGS / "schema" / f"{kind}.json"
    assert json.loads(path.read_text()) == file_schema(kind), (
        f"lpl-pretrain schema {kind} > configs/schema/{kind}.json"
    )


@pytest.mark.parametrize("kind, path", FILES, ids=lambda value: getattr(value, "name", value))
def test_every_file_names_its_schema_and_fits_it(kind, path):
    first_line = path.read_text().partition("\n")[0]
    assert first_line == f"# yaml-language-server: $schema=../schema/{kind}.json"
    assert (path.parent / f"../schema/{kind}.json").is_file()
    assert not errors(kind, read_mapping(path))


@pytest.mark.parametrize("kind", FILE_CLASSES)
def test_the_command_prints_it(kind):
    result = CliRunner().invoke(commands, ["schema", kind])
    assert result.exit_code == 0 and result.output == schema_text(kind)


def test_a_resolved_configuration_fits():
    config = load_config(TrainConfig, CONFIGS / "train/sdxl_lpl.yaml")
    assert not errors("train", parse(dump(config), "x"))


WHOLE = {
    "name": "x",
    "steps": 10,
    "autoencoder": "asset:autoencoder_emoji",
    "data": {"folder": "data/x"},
    "model": {"size": "S"},
    "diffusion": {"prediction": "flow", "schedule": "rectified_flow"},
    "batch": {"global_batch_size": 8},
}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"lpl": None, "data": {"folder": {"a": 1.0, "b": 2}}}, None),
        ({"lpl": {"weight": 1, "start_step": 0.5, "depth_weights": [1, 2.5]}}, None),
        ({"model": {"kind": "unet", "preset": "sd", "settings": {"layers_per_block": 1}}}, None),
        ({"model": {"kind": "mmdit", "size": "8B"}}, None),
        ({"model": {"kind": "dit", "size": "8B"}}, "fits none of anyOf"),
        ({"model": {"kind": "vit"}}, "fits none of anyOf"),
        ({"model": {"kind": "mmdit", "rope": True}}, "fits none of anyOf"),
        ({"steps": None}, "None does not fit type: integer"),
        ({"stepz": 3}, "stepz: not allowed"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr: 0 does not fit exclusiveMinimum"),
        ({"optimizer": {"betas": [0.9]}}, "does not fit minItems: 2"),
        ({"optimizer": {"lr_schedule": "linear"}}, "does not fit enum"),
        ({"lpl": {"target_share": 0.2}}, "target_share: not allowed"),
        ({"init_from": {"run": "x", "weights": "best"}}, "does not fit pattern"),
    ],
)
def test_mistakes_are_refused(changes, words):
    found = errors("train", {**WHOLE, **changes})
    assert (not found) if words is None else words in " ".join(found), found


def test_keys_are_required_without_a_base_only():
    assert errors("train", {"steps": 3}) and not errors("train", {"base": "x.yaml", "steps": 3})
    assert not errors("train", {"base": "x.yaml", "model": {"position_side": 16}, "data": {}})
    protocol = read_mapping(CONFIGS / "evaluate/emoji.yaml")
    assert errors("evaluate", {**protocol, "extractors": [{"name": "x"}]}), "no kind"


def test_descriptions_are_the_docstrings_of_keys():
    schema = file_schema("train")
    batch = schema["$defs"]["BatchConfig"]["properties"]["global_batch_size"]
    assert batch["description"] == "Samples per optimizer update, over all ranks."
    assert batch["title"] == "Global Batch Size"
    assert schema["$defs"]["OptimizerConfig"]["properties"]["lr"]["default"] == 1e-4


def test_unknown_keywords_are_not_passed_over():
    schema = copy.deepcopy(file_schema("encode"))
    schema["maxProperties"] = 1
    with pytest.raises(AssertionError, match="maxProperties"):
        schema_errors({}, schema, schema)
