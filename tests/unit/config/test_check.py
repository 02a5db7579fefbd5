"""Relations between sections, data and machines are checked before any accelerator is asked for."""

from pathlib import Path

import pytest

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.config.check import (
    FIRST_BETA,
    check_run,
    check_same_run,
    data_problems,
    grad_accum_steps,
    micro_batch_size,
    model_problems,
    objective_problems,
    run_identity,
)
from lpl_pretrain.config.dataset import BucketEntry, TextEntry
from lpl_pretrain.config.identity import autoencoder_identity
from lpl_pretrain.config.load import load_config, resolve_path
from lpl_pretrain.config.schema import ScheduleKind, TrainConfig
from lpl_pretrain.config.text import encoders, text_problems
from lpl_pretrain.config.zero import read_zero_config
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import ConfigError, DataError
from tests.support.configs import dataset_index, train_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(scope="module")
def identity():
    return autoencoder_identity(resolve_path("asset:autoencoder_emoji"))


def test_batch_arithmetic():
    config = train_config(batch__global_batch_size=96, batch__micro_batch_size=16)
    assert grad_accum_steps(config, 2) == 3
    assert micro_batch_size(train_config(batch__global_batch_size=96), 4) == 24
    with pytest.raises(
        ConfigError, match=r"batch.global_batch_size=96 is not a multiple of micro_batch_size=16 x dp_world_size=4 = 64"
    ):
        grad_accum_steps(config, 4)
    with pytest.raises(ConfigError, match="not a multiple of dp_world_size=5"):
        micro_batch_size(config.model_copy(update={"batch": train_config(batch__global_batch_size=8).batch}), 5)


def test_a_good_run_passes(identity):
    check_run(train_config(), dataset_index(identity=identity), 1)
    check_run(train_config(lpl__weight=1.0, lpl__stages=["mid", "up2"]), dataset_index(identity=identity), 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__patch_size": 3}, ["model.patch_size=3", "height=16", "divisor of 16"]),
        ({"diffusion__schedule": "cosine"}, ["diffusion.schedule=cosine", "flow goes with rectified_flow"]),
        ({"diffusion__prediction": "v"}, ["diffusion.prediction=v"]),
        ({"lpl__weight": 1.0, "lpl__gate": {"max_timestep": 200}}, ["lpl.gate.max_timestep=200", "min_snr"]),
        ({"data__flips": True}, ["data.flips=true: data/x holds no flipped latents"]),
        (
            {"lpl__weight": 1, "lpl__gate": {"min_snr": 1e9}, "diffusion": {"prediction": "v", "schedule": "cosine"}},
            ["lpl.gate: no sample can pass a noise level of 3.162e-05", "of cosine has 0.006425"],
        ),
        ({"lpl__weight": 1.0, "lpl__stages": ["up7"]}, ["lpl.stages=['up7']", "mid, up0, up1, up2"]),
        ({"lpl__weight": 1.0, "lpl__outliers": {"first_stage": 9}}, ["first_stage=9", "4 stages"]),
        ({"lpl__weight": 1.0, "lpl__depth_weights": [1.0, 2.0]}, ["2 numbers for the 4 compared stages mid, up0, up1, up2"]),
        ({"lpl__weight": 1.0, "lpl__depth_weights": [0, 0, 0, 0]}, ["nothing is left of the loss"]),
        ({"lpl__weight": 1.0, "lpl__crop": {"side": 17}}, ["lpl.crop.side=17", "16 positions"]),
        (
            {"lpl__weight": 1.0, "lpl__normalize": {"over": "batch"}, "batch__micro_batch_size": 4},
            ["lpl.normalize.over=batch", "2 microbatches", "micro_batch_size"],
        ),
    ],
)
def test_misfits_are_named(identity, changes, words):
    with pytest.raises(ConfigError) as error:
        check_run(train_config(**changes), dataset_index(identity=identity), 1)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", list(FIRST_BETA))
def test_least_noise_levels_are_those_of_the_schedules(kind):
    assert FIRST_BETA[kind] == pytest.approx(make_schedule(kind).betas[0].item(), rel=1e-6)
    assert set(FIRST_BETA) == set(ScheduleKind) - {ScheduleKind.RECTIFIED_FLOW}


def test_every_bucket_fits_the_patches(identity):
    index = dataset_index(identity=identity)
    buckets = [*index.buckets, BucketEntry(height=19, width=12, samples=3)]
    with pytest.raises(ConfigError, match="model.patch_size=2 does not divide the latent height=19"):
        check_run(train_config(), index.model_copy(update={"buckets": buckets}), 1)


def test_local_strategy_on_two_processes(identity):
    with pytest.raises(ConfigError, match="parallel.strategy=local with 2 processes"):
        check_run(train_config(), dataset_index(identity=identity), 2)


def test_shards_of_another_autoencoder(identity):
    with pytest.raises(DataError, match=f"was encoded by autoencoder 000000000000, but .* is {identity[:12]}"):
        check_run(train_config(), dataset_index(), 1)


def test_scaling_that_does_not_match_the_shards(identity):
    with pytest.raises(ConfigError, match=r"shift 0.0 and scale 0.18215, but autoencoder=.* has shift 0.0 and scale 1.09169"):
        check_run(train_config(), dataset_index(identity=identity, scale=0.18215), 1)


def test_another_decoder_is_checked_like_the_first(identity, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"_class_name": "AutoencoderTiny", "latent_channels": 16, "num_decoder_blocks": [1, 1], "upsampling_scaling_factor": 2}'
    )
    with pytest.raises(ConfigError) as error:
        check_run(
            train_config(lpl={"weight": 1.0, "decoder": str(tmp_path), "stages": ["up1"]}), dataset_index(identity=identity), 1
        )
    assert "takes latents of 16 channels, data/x has 4" in str(error.value) and "has mid, up0" in str(error.value)


def test_latents_that_the_decoder_does_not_take(identity):
    with pytest.raises(ConfigError, match="takes latents of 4 channels, data/x has 16"):
        check_run(train_config(lpl__weight=1.0), dataset_index(identity=identity, channels=16), 1)


def test_autoencoder_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="diffusion_pytorch_model.safetensors not found"):
        autoencoder_identity(tmp_path)


def test_stages_of_the_shipped_decoder():
    assert read_autoencoder("x", resolve_path("asset:autoencoder_emoji")).stages == ["mid", "up0", "up1", "up2"]


def test_continuing_a_run_names_what_differs():
    stored = train_config()
    check_same_run(stored, train_config(steps=100, checkpoint__every_steps=50, parallel__precision="bf16"), Path("runs/x"))
    with pytest.raises(ConfigError) as error:
        check_same_run(stored, train_config(optimizer__lr=2e-3, model__depth=3), Path("runs/x"))
    for word in ("runs/x", "optimizer.lr: the run has 0.001, you ask for 0.002", "model.depth: the run has 2, you ask for 3"):
        assert word in str(error.value)


def test_a_cosine_fixes_the_number_of_steps():
    with pytest.raises(ConfigError, match="steps: the run has 6, you ask for 7"):
        check_same_run(train_config(optimizer__decay="cosine"), train_config(optimizer__decay="cosine", steps=7), Path("runs/x"))


def test_the_identity_of_a_run_is_what_it_learns_by():
    """Free keys and defaults do not enter it, so a run may move, speed up, and meet a version with more keys."""
    base = run_identity(train_config())
    for free in ({"steps": 999}, {"parallel__precision": "bf16"}, {"optimizer__on_nonfinite": "skip"}, {"ema": {"warmup": True}}):
        assert run_identity(train_config(**free)) == base, free
    for learned in ({"seed": 5}, {"optimizer__lr": 0.123}, {"conditioning": {"label_dropout": 0.4}}):
        assert run_identity(train_config(**learned)) != base, learned
    cosine = {"optimizer__decay": "cosine"}
    assert run_identity(train_config(steps=7, **cosine)) != run_identity(train_config(steps=8, **cosine))


@pytest.mark.parametrize(
    "diffusion, words",
    [
        ({"prediction": "eps", "schedule": "cosine"}, "prediction=eps with diffusion.schedule=cosine.*use v"),
        (
            {"prediction": "eps", "schedule": "linear", "zero_terminal_snr": True},
            "eps with diffusion.zero_terminal_snr=true",
        ),
        ({"prediction": "flow", "schedule": "rectified_flow", "zero_terminal_snr": True}, "it ends in pure noise anyway"),
        ({"prediction": "v", "schedule": "linear", "timesteps": {"shift": 2.0}}, "timesteps.shift=2.0 with schedule=linear"),
    ],
)
def test_objectives_that_do_not_go_together(identity, diffusion, words):
    config = train_config(diffusion=diffusion, lpl=None)
    with pytest.raises(ConfigError, match=words):
        check_run(config, dataset_index(identity=identity), 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_fits_itself(path):
    """On a data folder as it wants one, on 8 processes: all relations but those to files that are not here."""
    config = load_config(TrainConfig, path)
    entries = {
        name: TextEntry(identity="0" * 64, width=768, max_tokens=77, pooled_width=768, storage="fp16")
        for name in encoders(config.conditioning.text)
    }
    index = dataset_index(side=64).model_copy(update={"text": entries, "flipped": True})
    assert grad_accum_steps(config, 8) >= 1
    assert not data_problems(config.data, index, encoders(config.conditioning.text))
    assert not text_problems(config.conditioning.text, entries, "data", model=config.model)
    assert not objective_problems(config) and not model_problems(config, index)
    if config.parallel.zero_config is not None:
        assert read_zero_config(config.parallel.zero_config)["zero_optimization"]["stage"] in (0, 1, 2, 3)
    assert config.lpl is None or path.stem.endswith("_lpl")
