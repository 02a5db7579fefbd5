"""Renamed keys: refused with the new name where a user writes them, read where an older version
stored them, and without an influence on the identity of a run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lpl_pretrain.config.check import check_same_run, run_identity
from lpl_pretrain.config.load import (
    differences,
    dump,
    flatten,
    load_config,
    load_run_config,
    validate_stored,
)
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.renamed_keys import (
    RENAMED,
    first_key,
    new_key,
    with_first_keys,
    with_new_keys,
)
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OLD_RUN = Path(__file__).parent / "old_run" / "config.yaml"
"""Configuration of a run that the version before the first rename stored, with every renamed key
off its default.
"""
OLD_IDENTITIES = {
    "timestep_below=200": "b37480714ff4ca20a27630cfcccdb69fabcea2a96f0470f18575ded157af4e35",
    "snr_above=5": "b4a553223cc9889613288c0265f57eb588d483e4274c74e14328316aec7179b4",
    "noise_level_below=0.7": "a38c0c0f4ae7f90d572ee6fe79e5be0f3de7dcd5f0303a8d892101a1a78b9219",
}
"""`run_identity` of that run, with three gates, as that version computed it."""
PRESENT = """
name: old
steps: 40
autoencoder: asset:autoencoder_emoji
data: {folder: data/x, shuffle_block_samples: 64}
model: {width: 32, depth: 2, heads: 2, patch_size: 2, text: in_context,
        timestep_frequencies: diffusers}
init_from: {run: runs/before, allow_mismatch: [y_embedder]}
conditioning:
  text_encoders: [clip]
  online_encoders: {clip: {folder: models/clip, pooled: true}}
diffusion: {prediction: eps, schedule: scaled_linear}
lpl: {target_fraction: 0.2, sample_fraction: 0.5, gate: {timestep_below: 200}, start_step: 10,
      calibration_steps: 5, noise_weighting: {kind: min_snr}}
optimizer: {lr: 0.001, lr_schedule: cosine, warmup_steps: 4}
batch: {global_batch_size: 8}
ema: {sigma_rel: [0.05, 0.1], snapshot_every_steps: 10}
log: {every_steps: 1, sample_indices: true}
checkpoint: {every_steps: 10}
watchdog: {factor: 9.0, at_least_s: 60.0}
"""
"""The same run, as a user writes it today."""


@pytest.fixture
def old_run(tmp_path) -> RunDir:
    shutil.copyfile(OLD_RUN, tmp_path / "config.yaml")
    return RunDir(tmp_path)


@pytest.fixture
def present(tmp_path) -> Path:
    path = tmp_path / "present.yaml"
    path.write_text(PRESENT)
    return path


def test_the_old_run_uses_every_old_key():
    keys = flatten(yaml.safe_load(OLD_RUN.read_text())).keys()
    for old in RENAMED["TrainConfig"]:
        assert any(key == old or key.startswith(f"{old}.") for key in keys), old


def test_an_old_run_loads_and_is_the_same_run_as_the_present_configuration(old_run, present):
    stored, wanted = load_run_config(old_run), load_config(TrainConfig, present)
    assert not differences(stored, wanted)
    assert stored == wanted
    check_same_run(stored, wanted, old_run.path)
    assert load_config(TrainConfig, present, ["steps=40", "watchdog=null"]).watchdog is None


def test_a_difference_is_named_by_the_new_key(old_run, present):
    wanted = load_config(TrainConfig, present, ["lpl.target_fraction=0.3"])
    with pytest.raises(ConfigError, match="lpl.target_fraction: the run has 0.2, you ask for 0.3"):
        check_same_run(load_run_config(old_run), wanted, old_run.path)


@pytest.mark.parametrize("gate, identity", OLD_IDENTITIES.items())
def test_the_identity_of_a_run_is_what_it_was(old_run, present, gate, identity):
    """Checkpoints hold it."""
    assert run_identity(load_config(TrainConfig, present, [f"lpl.gate.{gate}"])) == identity
    if gate == "timestep_below=200":
        assert run_identity(load_run_config(old_run)) == identity


def test_a_stored_copy_is_read_by_its_path(old_run, tmp_path):
    """`train RUN/config.yaml`, and a job that was queued before an update; a user's file is not."""
    with pytest.raises(ConfigError, match="hang: this key is called watchdog now; rename it"):
        load_config(TrainConfig, old_run.config)
    (tmp_path / "provenance.json").write_text("[]")
    assert load_config(TrainConfig, old_run.config) == load_run_config(old_run)
    job = tmp_path / "launch"
    job.mkdir()
    shutil.copyfile(OLD_RUN, job / "config.yaml")
    (job / "job.json").write_text("{}")
    assert load_config(TrainConfig, job / "config.yaml") == load_run_config(old_run)


@pytest.mark.parametrize("old, new", RENAMED["TrainConfig"].items())
def test_an_old_key_of_a_user_is_refused_with_the_new_one(present, old, new):
    with pytest.raises(ConfigError, match=f"{old}: this key is called {new} now; rename it"):
        load_config(TrainConfig, present, [f"{old}=null"])


def test_old_keys_of_a_file_are_all_named_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OLD_RUN.read_text())
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, path)
    text = str(error.value)
    for old, new in RENAMED["TrainConfig"].items():
        assert f" {old}: this key is called {new} now; rename it" in text


def test_a_stored_protocol():
    raw = yaml.safe_load((CONFIGS / "evaluate/emoji.yaml").read_text())
    stored = {**raw, "few_images": "refuse"}
    config = validate_stored(EvaluateConfig, stored, "x")
    assert config.on_too_few_images == "refuse"
    dumped = config.model_dump(mode="json")
    first = with_first_keys("EvaluateConfig", dumped)
    assert first["few_images"] == "refuse" and "on_too_few_images" not in first
    assert list(first.values()) == list(dumped.values()), "the order is that of the fields"
    assert json.dumps(with_new_keys("EvaluateConfig", first)) == json.dumps(dumped)


def test_table():
    """Every new key is a key of its configuration; a rename stays in its section; no old key is
    a new one of another.
    """
    for config_class, names in RENAMED.items():
        assert len(set(names.values())) == len(names)
        assert not names.keys() & set(names.values())
        for old, new in names.items():
            assert old.rpartition(".")[0] == new.rpartition(".")[0]
            assert new_key(config_class, old) == new and new_key(config_class, new) is None
            assert first_key(config_class, new) == old
            assert first_key(config_class, f"{new}.inner") == f"{old}.inner"
            assert first_key(config_class, f"{new}_more") == f"{new}_more"


def test_keys_of_other_types_and_taken_names_stay():
    raw = {1: {"a.b": 2}, "hang": None, "watchdog": None, "log": {"samples": True}}
    renamed = with_new_keys("TrainConfig", raw)
    assert renamed == {
        1: {"a.b": 2},
        "hang": None,
        "watchdog": None,
        "log": {"sample_indices": True},
    }
    assert with_new_keys("OtherConfig", raw) == raw


def test_what_is_stored_today_has_new_keys(present):
    text = dump(load_config(TrainConfig, present))
    stored = flatten(yaml.safe_load(text)).keys()
    assert not any(
        key == old or key.startswith(f"{old}.") for key in stored for old in RENAMED["TrainConfig"]
    )
    assert validate_stored(TrainConfig, yaml.safe_load(text), "x") == load_config(
        TrainConfig, present
    )
