"""One reader for every configuration: what is refused, in which words, and what is read as it was
written.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpl_pretrain.cli import train as train_command
from lpl_pretrain.config.base import _checked_name, _checked_path, _expanded_path
from lpl_pretrain.config.check import check_same_run, run_identity
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.load import dump, load_config, validate
from lpl_pretrain.config.problems import HANDLED, OF_ITS_KIND, OTHER_KIND
from lpl_pretrain.config.protocol import EvaluateConfig, _known_extractor, _known_metric
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.yaml_reader import read_value
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.build import check_model_runs
from tests.support.config_errors import check_error_message, leaves
from tests.support.configs import TINY_SDXL, dataset_index, train_config

TINY = dump(train_config())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.yaml"


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, path, overrides)
    check_error_message(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"name: \xe9\n", ["line 1", "not UTF-8"]),
        (TINY.encode("utf-16"), ["not UTF-8"]),
        (b"a: 1\nsteps: !!int foo", ["line 2", "tag", "write the value alone"]),
        (b"a: !!python/object/apply:os.system [id]", ["line 1", "tag"]),
        (b"steps: 1\nseed: 2\nsteps: 3", ["line 3", "'steps' is there twice"]),
        (b"model: {width: 1, width: 2}", ["line 1", "'width' is there twice"]),
        (b"[" * 1000, ["nested more than 32 deep"]),
        (b"seed: " + b"7" * 5000, ["line 1", "5000 digits"]),
        (b"1: 2", ["line 1", "the key 1 is not text; put it in quotes"]),
        (b"? [a]\n: 1", ["the key ['a'] is not text"]),
        (b"a: &a [*a]", ["*a stands for nothing"]),
        (b"a: 1\n---\nb: 2", ["line 2", "second document"]),
        (b"a: 1\n\tb: 2", ["line 2", "not valid YAML", "'\\t'"]),
        (b'name: "a\x00"', ["line 1", "'\\x00'"]),
        (b'name: "\\ud83d"', ["half a character"]),
        (b"# " + b"c" * 300_000, ["more than 262144 bytes"]),
        (b"false", ["holds a bool, wanted a mapping"]),
        (b"base: [x.yaml]", ["base=['x.yaml']", "path of one file"]),
        (b'base: "a\\nb"', ["base: 'a\\nb'", "control character"]),
        (b"base: ~nobody-of-this-name/x.yaml", ["no home folder"]),
    ],
)
def test_a_file_that_cannot_be_read(path, content, words):
    path.write_bytes(content)
    text = refusal(path)
    assert all(word in text for word in (*words, path.name)), text


def test_an_alias_bomb_is_cut_short(path):
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    path.write_text("\n".join(["a0: &a0 [x, x]", *levels]))
    assert "more than 20000 values" in refusal(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refusal(tmp_path / "pipe")
    assert "is a directory" in refusal(tmp_path)
    assert "is a pipe or a device" in refusal(Path("/dev/zero"))
    assert "no such configuration file" in refusal(tmp_path / "x" / "y.yaml")
    assert "wanted a shorter one" in refusal(tmp_path / ("x" * 300))
    assert "control character" in refusal(tmp_path / "a\nb.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "cannot be read" in refusal(tmp_path / "loop.yaml")


def test_a_base_that_comes_back_under_another_name(tmp_path):
    (tmp_path / "one.yaml").write_text("base: ./two.yaml")
    (tmp_path / "two.yaml").write_text(f"base: ../{tmp_path.name}/one.yaml")
    assert "comes back to itself" in refusal(tmp_path / "one.yaml")


def test_aliases_and_merge_keys_are_copies(path):
    path.write_text(
        TINY.replace("model:\n", "model:\n  <<: {width: 64, rope: true}\n").replace(
            "  rope: false\n", ""
        )
    )
    config = load_config(TrainConfig, path)
    assert (config.model.width, config.model.rope) == (32, True)
    path.write_text("setup: &a [one]\ncontainer: *a\n")
    profile = load_config(ClusterProfile, path)
    assert profile.setup == profile.container == ("one",)


@pytest.mark.parametrize(
    "override, words",
    [
        ("steps=true", ["steps=True: wanted an integer"]),
        ('steps="5"', ["steps='5': wanted an integer"]),
        ("steps=1.5", ["without a fraction"]),
        ("steps=1e300", ["below 9223372036854775808"]),
        ("steps=1:30", ["steps='1:30': wanted an integer"]),
        ("steps=010", ["steps='010': wanted an integer"]),
        ("optimizer.lr=.inf", ["optimizer.lr=inf: wanted a finite number"]),
        ("optimizer.lr=.nan", ["wanted a finite number"]),
        ("optimizer.lr=1e999", ["wanted a finite number"]),
        ("optimizer.lr=0x", ["optimizer.lr='0x': wanted a number"]),
        ("data.flips=1", ["data.flips=1: wanted true or false"]),
        ("name=5", ["name=5: wanted text"]),
        ("name=a/b", ["name='a/b': holds a /"]),
        ("data.folder={a: true}", ["data.folder.a=True: wanted a number"]),
        ("data.folder=[a]", ["data.folder=['a']: wanted text or a mapping"]),
        ('data.folder={"a\\n": 1}', ["data.folder.'a\\n': its key has the control character"]),
        ("lpl={weight: 1, depth_weights: x}", ["'inverse_resolution' or 'uniform' or a list"]),
        (
            "lpl={weight: 1, outliers: {kernels: [[1, 3], [1, x]]}}",
            ["lpl.outliers.kernels.1.1='x': wanted an integer"],
        ),
        ("conditioning.text_encoders=[[a, 5]]", ["conditioning.text_encoders.0.1=5: wanted text"]),
        ("model={kind: [1]}", ["model.kind='[1]': wanted one of"]),
        ("model={size: [1]}", ["model.size=[1]"]),
        ("model=3", ["model=3: wanted a section"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas.1: missing"]),
        (
            "optimizer.betas=[0.9, 0.9, 0.9]",
            ["optimizer.betas=[0.9, 0.9, 0.9]: has 3 values, wanted 2"],
        ),
        ("model.width=30", ["width=30: rows and columns", "multiple of 4"]),
        ("model.mlp_ratio=0.001", ["leaves the MLP no channel"]),
        ("a..b=1", ["'a..b=1': an override is key=value"]),
        (".=1", ["an override is key=value"]),
        ("=1", ["an override is key=value"]),
        (".".join("a" * 100) + "=1", ["its key has 100 parts"]),
        ("name.x=1", ["name='tiny' is a value and no section"]),
        ("lpl.stages=[mid, up0", ["its value, line 1: not valid YAML", "put quotes around a text"]),
        ("name='tis", ["put quotes around a text"]),
    ],
)
def test_a_value_that_is_refused(path, override, words):
    path.write_text(TINY)
    text = refusal(path, (override,))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "text, value",
    [
        ("run #2", "run #2"),
        ("a: b", "a: b"),
        ("2024-13-45", "2024-13-45"),
        ("12:30", "12:30"),
        ("3e-4", "3e-4"),
        ("*a", "*a"),
        ("!!int 5", "!!int 5"),
        ("- 1", "- 1"),
        (" x", " x"),
        ('"a\\n#: 1"', "a\n#: 1"),
        ('"\\ud83d\\ude00"', "😀"),
        ("'it''s'", "it's"),
        ("[1, a]", [1, "a"]),
        ("{a: [0.5, null]}", {"a": [0.5, None]}),
        ("17", 17),
        ("1.5", 1.5),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_an_override_means_what_was_typed(text, value):
    found = read_value(text)
    assert found == value and type(found) is type(value)


def test_numbers_in_scientific_spelling(path):
    path.write_text(TINY)
    config = load_config(
        TrainConfig,
        path,
        ["optimizer.lr=3e-4", "steps=5e2", "optimizer.betas=[9e-1, 1E-1]", "name=1e-4"],
    )
    assert (config.optimizer.lr, config.steps, config.optimizer.betas, config.name) == (
        3e-4,
        500,
        (0.9, 0.1),
        "1e-4",
    )
    path.write_text(dump(config))
    assert load_config(TrainConfig, path) == config


def test_many_problems_are_few_lines(path):
    path.write_text("\n".join(f"key{i}: {'x' * 500}" for i in range(33)))
    lines = refusal(path).splitlines()
    assert len(lines) == 21 and lines[-1].endswith(
        "and 20 more problems"
    )  # 33 unknown keys, 7 missing ones


@pytest.mark.parametrize("cls", [TrainConfig, EncodeConfig, EvaluateConfig])
def test_every_text_is_a_name_a_path_or_one_of_a_few(cls):
    """A field that is added as a plain `str` is found here."""
    ours = {_checked_name, _checked_path, _expanded_path, _known_metric, _known_extractor}
    for path, kind, metadata in leaves(cls):
        constrained = any(
            getattr(part, "func", None) in ours or "pattern=" in repr(part) for part in metadata
        )
        assert kind is not str or constrained or path == "model.settings", path


SCHEMAS: dict[str, set[str]] = {
    "int": {"int_type", "int_parsing_size", "int_from_float", "finite_number"}
    | {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of"},
    "float": {
        "float_type",
        "finite_number",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
    },
    "bool": {"bool_type"},
    "str": {
        "string_type",
        "string_unicode",
        "string_pattern_mismatch",
        "string_too_short",
        "string_too_long",
    },
    "enum": {"enum"},
    "literal": {"literal_error"},
    "list": {"list_type", "too_short", "too_long"},
    "tuple": {"tuple_type", "too_short", "too_long", "missing"},
    "dict": {"dict_type", "too_short", "too_long"},
    "model": {"model_type", "model_attributes_type"},
    "model-fields": {"extra_forbidden", "missing", "model_type", "invalid_key", "recursion_loop"},
    "tagged-union": {"union_tag_invalid", "union_tag_not_found"},
    "function-after": {"value_error", "unusable_text"},
    "function-before": {"value_error"},
}
"""Kind of a schema -> the errors that pydantic can raise there."""
SILENT = {
    "nullable",
    "default",
    "any",
    "union",
    "model-field",
    "definitions",
    "definition-ref",
    "none",
}
SILENT |= {"chain", "function-wrap", "no-info", "with-info"}


def test_every_error_that_can_occur_has_our_words():
    found: set[str] = set()

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            if isinstance(schema.get("type"), str):
                found.add(schema["type"])
            for key, part in schema.items():
                if key not in ("metadata", "serialization", "default", "config", "expected"):
                    walk(part)
        elif isinstance(schema, list | tuple):
            for part in schema:
                walk(part)

    for cls in (TrainConfig, EncodeConfig, EvaluateConfig, ClusterProfile):
        walk(cls.__pydantic_core_schema__)
    assert found <= SCHEMAS.keys() | SILENT, found
    for kind in found - SILENT:
        for error in SCHEMAS[kind]:
            assert error in HANDLED | OTHER_KIND.keys() | OF_ITS_KIND.keys(), (kind, error)


def test_a_run_keeps_its_identity_whatever_its_home_folder_is(tmp_path, monkeypatch):
    """`~` is compared, hashed and stored as it was written."""
    identities, dumps = [], []
    for home in ("a", "b"):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        config = train_config(lpl={"weight": 1.0, "decoder": "~/taesd"})
        assert config.lpl.decoder == str(tmp_path / home / "taesd")
        identities.append(run_identity(config))
        dumps.append(dump(config))
        check_same_run(validate(TrainConfig, config.model_dump(mode="json"), "x"), config, tmp_path)
    assert identities[0] == identities[1] and dumps[0] == dumps[1]
    # what the version before this one has written into the checkpoints of such a run
    assert identities[0] == "d14994c6bbbcc807d804eb0deac6af4ea8300c588bf126f7c22d837fb2036270"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"down_block_types": ["DownBlock2D", "Nonsense"]}, ["Nonsense does not exist"]),
        ({"mid_block_type": "x"}, ["unknown mid_block_type : x"]),
    ],
)
def test_a_model_that_cannot_run_is_found_on_meta_tensors(settings, words):
    model = {"kind": "unet", "preset": "ldm", "settings": {**TINY_SDXL["settings"], **settings}}
    config, index = train_config(model=model), dataset_index(side=8)
    with pytest.raises(ConfigError) as error:
        check_model_runs(config, index)
    check_error_message(error.value)
    assert all(word in str(error.value) for word in ("model.settings=", *words))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"colour": 3}, ["settings.colour: unknown key"]),
        ({"layers_per_block": "2"}, ["settings.layers_per_block='2': wanted an integer or a list"]),
        ({"block_out_channels": 3}, ["settings.block_out_channels=3: wanted a list"]),
        ({"block_out_channels": [16, 30]}, ["30 channels are not a multiple of norm_num_groups=8"]),
        ({"block_out_channels": [16]}, ["settings.down_block_types", "wanted 1 values"]),
        ({"layers_per_block": 10**9}, ["less than or equal to 64"]),
        ({"norm_eps": float("nan")}, ["wanted a finite number"]),
        ({"sample_size": 8}, ["follows from the data"]),
    ],
)
def test_settings_of_a_unet_are_checked_without_torch(settings, words):
    model = {"kind": "unet", "preset": "sdxl", "settings": {**TINY_SDXL["settings"], **settings}}
    with pytest.raises(ConfigError) as error:
        validate(TrainConfig, {**train_config().model_dump(mode="json"), "model": model}, "x.yaml")
    check_error_message(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_training_runs_the_model_on_meta_tensors_before_any_device(path, monkeypatch):
    model = {
        "kind": "unet",
        "preset": "ldm",
        "settings": {**TINY_SDXL["settings"], "mid_block_type": "x"},
    }
    path.write_text(dump(train_config(model=model)))
    data = SimpleNamespace(merged=dataset_index(side=8))
    monkeypatch.setattr(train_command, "accepted", lambda config, run_dir, world: (data, None))
    monkeypatch.setattr(
        "lpl_pretrain.preflight.run.run_preflight", lambda *args: pytest.fail("a device was set up")
    )
    with pytest.raises(ConfigError, match="unknown mid_block_type"):
        train_command.run(str(path), ())
