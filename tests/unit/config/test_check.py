"""Relations between sections, data and machines are checked before any accelerator is asked for."""

import re
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
from lpl_pretrain.config.gate import gate_fraction
from lpl_pretrain.config.hashing import autoencoder_identity
from lpl_pretrain.config.load import load_config, resolve_path
from lpl_pretrain.config.lpl import GateConfig
from lpl_pretrain.config.notes import start_notes
from lpl_pretrain.config.schema import DiffusionConfig, ScheduleKind, TrainConfig
from lpl_pretrain.config.text_layout import encoders, text_problems
from lpl_pretrain.config.zero import read_zero_config
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.losses.lpl.gate import gate_fraction as torch_gate_fraction
from lpl_pretrain.losses.lpl.gate import max_noise_level
from lpl_pretrain.losses.lpl.weight import LPLWeight
from tests.support.configs import TINY_MMDIT, TINY_SDXL, dataset_index, train_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(scope="module")
def identity():
    return autoencoder_identity(resolve_path("asset:autoencoder_emoji"))


def test_batch_arithmetic():
    config = train_config(batch__global_batch_size=96, batch__micro_batch_size=16)
    assert grad_accum_steps(config, 2) == 3
    assert micro_batch_size(train_config(batch__global_batch_size=96), 4) == 24
    with pytest.raises(
        ConfigError,
        match=r"batch.global_batch_size=96 is not a multiple of micro_batch_size=16 x "
        r"dp_world_size=4 = 64",
    ):
        grad_accum_steps(config, 4)
    with pytest.raises(ConfigError, match="not a multiple of dp_world_size=5"):
        micro_batch_size(
            config.model_copy(update={"batch": train_config(batch__global_batch_size=8).batch}), 5
        )


def test_a_good_run_passes(identity):
    check_run(train_config(), dataset_index(identity=identity), 1)
    check_run(
        train_config(lpl__weight=1.0, lpl__stages=["mid", "up2"]),
        dataset_index(identity=identity),
        1,
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__patch_size": 3}, ["model.patch_size=3", "height=16", "divisor of 16"]),
        (
            {"diffusion__schedule": "cosine"},
            ["diffusion.schedule=cosine", "flow goes with rectified_flow"],
        ),
        ({"diffusion__prediction": "v"}, ["diffusion.prediction=v"]),
        (
            {"lpl__weight": 1.0, "lpl__gate": {"timestep_below": 200}},
            ["lpl.gate.timestep_below=200", "snr_above"],
        ),
        ({"data__flips": True}, ["data.flips=true: data/x holds no flipped latents"]),
        (
            {
                "lpl__weight": 1,
                "lpl__gate": {"snr_above": 1e9},
                "diffusion": {"prediction": "v", "schedule": "cosine"},
            },
            ["lpl.gate: no sample can pass a noise level of 3.162e-05", "of cosine has 0.006425"],
        ),
        (
            {"lpl__weight": 1.0, "lpl__stages": ["up7"]},
            ["lpl.stages=['up7']", "mid, up0, up1, up2"],
        ),
        ({"lpl__weight": 1.0, "lpl__outliers": {"first_stage": 9}}, ["first_stage=9", "4 stages"]),
        (
            {"lpl__weight": 1.0, "lpl__depth_weights": [1.0, 2.0]},
            ["2 numbers for the 4 compared stages mid, up0, up1, up2"],
        ),
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
    with pytest.raises(
        ConfigError, match="model.patch_size=2 does not divide the latent height=19"
    ):
        check_run(train_config(), index.model_copy(update={"buckets": buckets}), 1)


def test_local_strategy_on_two_processes(identity):
    with pytest.raises(ConfigError, match="parallel.strategy=local with 2 processes"):
        check_run(train_config(), dataset_index(identity=identity), 2)


def test_shards_of_another_autoencoder(identity):
    with pytest.raises(
        DataError, match=f"was encoded by autoencoder 000000000000, but .* is {identity[:12]}"
    ):
        check_run(train_config(), dataset_index(), 1)


def test_scaling_that_does_not_match_the_shards(identity):
    with pytest.raises(
        ConfigError,
        match=r"shift 0.0 and scale 0.18215, but autoencoder=.* has shift 0.0 and scale 1.09169",
    ):
        check_run(train_config(), dataset_index(identity=identity, scale=0.18215), 1)


def test_another_decoder_is_checked_like_the_first(identity, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"_class_name": "AutoencoderTiny", "latent_channels": 16, "num_decoder_blocks": [1, 1], '
        '"upsampling_scaling_factor": 2}'
    )
    with pytest.raises(ConfigError) as error:
        check_run(
            train_config(lpl={"weight": 1.0, "decoder": str(tmp_path), "stages": ["up1"]}),
            dataset_index(identity=identity),
            1,
        )
    assert "takes latents of 16 channels, data/x has 4" in str(
        error.value
    ) and "has mid, up0" in str(error.value)


def test_latents_that_the_decoder_does_not_take(identity):
    with pytest.raises(ConfigError, match="takes latents of 4 channels, data/x has 16"):
        check_run(train_config(lpl__weight=1.0), dataset_index(identity=identity, channels=16), 1)


def test_autoencoder_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="diffusion_pytorch_model.safetensors not found"):
        autoencoder_identity(tmp_path)


def test_stages_of_the_shipped_decoder():
    assert read_autoencoder("x", resolve_path("asset:autoencoder_emoji")).stages == [
        "mid",
        "up0",
        "up1",
        "up2",
    ]


def test_continuing_a_run_names_what_differs():
    stored = train_config()
    check_same_run(
        stored,
        train_config(steps=100, checkpoint__every_steps=50, parallel__precision="bf16"),
        Path("runs/x"),
    )
    with pytest.raises(ConfigError) as error:
        check_same_run(stored, train_config(optimizer__lr=2e-3, model__depth=3), Path("runs/x"))
    for word in (
        "runs/x",
        "optimizer.lr: the run has 0.001, you ask for 0.002",
        "model.depth: the run has 2, you ask for 3",
    ):
        assert word in str(error.value)


def test_a_cosine_fixes_the_number_of_steps():
    with pytest.raises(ConfigError, match="steps: the run has 6, you ask for 7"):
        check_same_run(
            train_config(optimizer__lr_schedule="cosine"),
            train_config(optimizer__lr_schedule="cosine", steps=7),
            Path("runs/x"),
        )


def test_the_identity_of_a_run_is_what_it_learns_by():
    """Free keys and defaults do not enter it, so a run may move, speed up, and meet a version with
    more keys.
    """
    base = run_identity(train_config())
    for free in (
        {"steps": 999},
        {"parallel__precision": "bf16"},
        {"optimizer__on_nonfinite": "skip"},
        {"ema": {"warmup": True}},
    ):
        assert run_identity(train_config(**free)) == base, free
    for learned in (
        {"seed": 5},
        {"optimizer__lr": 0.123},
        {"conditioning": {"label_dropout": 0.4}},
    ):
        assert run_identity(train_config(**learned)) != base, learned
    cosine = {"optimizer__lr_schedule": "cosine"}
    assert run_identity(train_config(steps=7, **cosine)) != run_identity(
        train_config(steps=8, **cosine)
    )


@pytest.mark.parametrize(
    "diffusion, words",
    [
        (
            {"prediction": "eps", "schedule": "cosine"},
            "prediction=eps with diffusion.schedule=cosine.*use v",
        ),
        (
            {"prediction": "eps", "schedule": "linear", "zero_terminal_snr": True},
            "eps with diffusion.zero_terminal_snr=true",
        ),
        (
            {"prediction": "flow", "schedule": "rectified_flow", "zero_terminal_snr": True},
            "it ends in pure noise anyway",
        ),
        (
            {"prediction": "v", "schedule": "linear", "timesteps": {"shift": 2.0}},
            "timesteps.shift=2.0 with schedule=linear",
        ),
    ],
)
def test_objectives_that_do_not_go_together(identity, diffusion, words):
    config = train_config(diffusion=diffusion, lpl=None)
    with pytest.raises(ConfigError, match=words):
        check_run(config, dataset_index(identity=identity), 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_fits_itself(path):
    """Data folder as the configuration needs it, on 8 processes: all relations hold but those to
    files that are not here.
    """
    config = load_config(TrainConfig, path)
    entries = {
        name: TextEntry(
            identity="0" * 64, width=768, max_tokens=77, pooled_width=768, storage="fp16"
        )
        for name in encoders(config.conditioning.text_encoders)
    }
    index = dataset_index(side=64).model_copy(update={"text": entries, "flipped": True})
    assert grad_accum_steps(config, 8) >= 1
    assert not data_problems(config.data, index, encoders(config.conditioning.text_encoders))
    assert not text_problems(config.conditioning.text_encoders, entries, "data", model=config.model)
    assert not objective_problems(config) and not model_problems(config, index)
    if config.parallel.zero_config is not None:
        assert read_zero_config(config.parallel.zero_config)["zero_optimization"]["stage"] in (
            0,
            1,
            2,
            3,
        )
    assert config.lpl is None or path.stem.endswith("_lpl")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"lpl__weight": 1.0, "lpl__start_step": 6},
            "lpl.start_step=6 with steps=6: LPL never runs",
        ),
        (
            {"lpl__weight": 1.0, "lpl__start_step": 1_000_000},
            "lpl.start_step=1000000 with steps=6: LPL never runs",
        ),
        (
            {"lpl__target_fraction": 0.2, "lpl__calibration_steps": 7},
            "start_step=0 with lpl.calibration_steps=7 and steps=6",
        ),
        (
            {"lpl__target_fraction": 0.2, "lpl__start_step": 4, "lpl__calibration_steps": 2},
            "LPL never is a part of the loss",
        ),
        (
            {"lpl__weight": 1.0, "lpl__gate": {"noise_level_below": 1e-9}},
            "lpl.gate: 1e-09 of the samples pass it under diffusion.timesteps, 4.8e-08 over "
            "all steps",
        ),
        (
            {
                "lpl__weight": 1.0,
                "lpl__gate": {"snr_above": 3.0},
                "diffusion__timesteps": {"distribution": "logit_normal", "mean": 10.0, "std": 0.1},
            },
            "lpl.gate: .* so that LPL never runs: open the gate",
        ),
    ],
)
def test_lpl_that_never_runs_is_refused(identity, changes, words):
    with pytest.raises(ConfigError, match=words):
        check_run(train_config(**changes), dataset_index(identity=identity), 1)


def test_lpl_of_one_step_is_enough(identity):
    index = dataset_index(identity=identity)
    check_run(train_config(lpl__weight=1.0, lpl__start_step=5), index, 1)
    check_run(
        train_config(lpl__target_fraction=0.2, lpl__start_step=3, lpl__calibration_steps=2),
        index,
        1,
    )


@pytest.mark.parametrize("kind", list(ScheduleKind))
@pytest.mark.parametrize(
    "timesteps",
    [
        {},
        {"distribution": "logit_normal", "mean": 0.5, "std": 1.3},
        {"distribution": "mode", "mode_scale": 1.29},
        {"distribution": "cosmap"},
    ],
    ids=lambda timesteps: timesteps.get("distribution", "uniform"),
)
@pytest.mark.parametrize(
    "gate", [{"snr_above": 3.0}, {"noise_level_below": 2.5}, {"timestep_below": 200}], ids=str
)
def test_the_gate_without_torch_is_the_gate(kind, timesteps, gate):
    """config/gate.py against losses/lpl/gate.py."""
    if kind is ScheduleKind.RECTIFIED_FLOW and "timestep_below" in gate:
        return
    for options in (
        ({}, {"zero_terminal_snr": True})
        if kind is not ScheduleKind.RECTIFIED_FLOW
        else ({"shift": 3.0},)
    ):
        shift = options.pop("shift", 1.0)
        diffusion = DiffusionConfig(
            prediction="v", schedule=kind, timesteps={**timesteps, "shift": shift}, **options
        )
        schedule = make_schedule(kind, **options)
        wanted = torch_gate_fraction(
            max_noise_level(GateConfig(**gate), schedule), schedule, diffusion.timesteps
        )
        assert gate_fraction(GateConfig(**gate), diffusion) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "start, steps, wanted",
    [
        (0.875, 1200, 1050),
        (0.1, 30, 3),
        (0.29, 100, 29),
        (0.999, 10, 9),
        (0.01, 10, 0),
        (7, 10, 7),
        ("0.5", 9, 4),
        ("1e1", 20, 10),
    ],
)
def test_a_start_as_a_fraction_of_the_steps(start, steps, wanted):
    """Rounded down, in exact decimal arithmetic: 0.29 * 100 is 28.999999999999996 in floats."""
    config = train_config(steps=steps, lpl__weight=1.0, lpl__start_step=start)
    assert config.lpl.start_step == wanted and type(config.lpl.start_step) is int
    assert LPLWeight(config.lpl).active(wanted) and not LPLWeight(config.lpl).active(wanted - 1)
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "start",
    [
        1.0,
        0.0,
        1050.0,
        1.5,
        -1,
        -0.5,
        True,
        False,
        None,
        [1],
        float("nan"),
        float("inf"),
        "soon",
        "10.5",
    ],
)
def test_a_start_that_is_neither(start):
    with pytest.raises(
        ValueError, match="wanted a whole number of steps such as 1050, or a fraction"
    ) as error:
        train_config(lpl__weight=1.0, lpl__start_step=start)
    assert error.value.error_count() == 1


def test_a_fraction_means_the_same_step_when_a_run_is_continued():
    """The number of steps is what is compared: more steps are free with the start as it was, and
    move a fraction.
    """
    stored = train_config(steps=1200, lpl__weight=1.0, lpl__start_step=0.875)
    same = train_config(steps=1200, lpl__weight=1.0, lpl__start_step=1050)
    check_same_run(stored, same, Path("runs/x"))
    check_same_run(
        stored, train_config(steps=2000, lpl__weight=1.0, lpl__start_step=1050), Path("runs/x")
    )
    assert run_identity(stored) == run_identity(same)
    with pytest.raises(
        ConfigError, match="lpl.start_step: the run has 1050, you ask for 1750"
    ) as error:
        check_same_run(
            stored, train_config(steps=2000, lpl__weight=1.0, lpl__start_step=0.875), Path("runs/x")
        )
    assert "1200 then and 2000 now: write lpl.start_step=1050" in str(error.value)


def text_index(identity, **changes):
    entry = TextEntry(identity="0" * 64, width=8, max_tokens=4, pooled_width=8, storage="fp16")
    return dataset_index(identity=identity).model_copy(update={"text": {"clip": entry}, **changes})


TEXT = {"model": TINY_MMDIT, "conditioning": {"text_encoders": ["clip"]}}


def test_a_text_model_on_latents_without_captions_is_refused(identity):
    with pytest.raises(
        ConfigError, match="data/x holds no captions, 100 % of its 32 samples have none"
    ):
        check_run(train_config(**TEXT), text_index(identity), 1)
    check_run(train_config(**TEXT), text_index(identity, captions=1), 1)
    assert (
        "captions: 96.88% of the samples (31 of 32) have none; they are trained with the null text"
        in start_notes(train_config(**TEXT), text_index(identity, captions=1))
    )


@pytest.mark.parametrize(
    "config, index, wanted",
    [
        ({}, {"text": {}}, []),
        (
            {},
            {"text": {}, "flipped": True},
            ["data.flips=false: the flipped latents that the data hold are not used"],
        ),
        ({"data__flips": True}, {"text": {}, "flipped": True}, []),
        (
            {},
            {"text": {}, "captions": 32},
            ["model.kind=dit: this model reads no text; the captions that the data hold are not"],
        ),
        (
            {},
            {"captions": 32},
            ["model.kind=dit: this model reads no text; the embeddings by clip that the data hold"],
        ),
        (TEXT, {"captions": 32, "classes": []}, []),
        (
            TEXT,
            {"captions": 32},
            [
                "model.kind=mmdit: this model reads no classes; the 2 classes of the data "
                "are not used"
            ],
        ),
        (
            {"model": TINY_SDXL, "conditioning": {"text_encoders": ["clip"]}},
            {"captions": 32},
            ["model.kind=unet: this model reads no classes"],
        ),
        ({"model": {"kind": "unet", "preset": "ldm"}}, {"text": {}}, []),
        (
            {"lpl__weight": 1.0, "lpl__ramp_steps": 12},
            {"text": {}},
            ["lpl.ramp_steps=12 from step 0 on with steps=6: .* 50%"],
        ),
        ({"lpl__weight": 1.0, "lpl__ramp_steps": 6}, {"text": {}}, []),
    ],
)
def test_what_is_stored_and_not_used_is_named_once(identity, config, index, wanted):
    notes = start_notes(train_config(**config), text_index(identity, **index))
    assert len(notes) == len(wanted), notes
    for note, words in zip(notes, wanted):
        assert re.match(words, note) and "\n" not in note


def test_stored_encoders_that_are_not_read_are_named(identity):
    index = text_index(identity, captions=32, classes=[])
    index = index.model_copy(update={"text": {**index.text, "t5": index.text["clip"]}})
    assert start_notes(train_config(**TEXT), index) == [
        "conditioning.text_encoders: the stored embeddings by t5 are not used"
    ]


def test_zero_stages_are_checked_before_torch(identity, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    index = dataset_index(identity=identity)
    check_run(train_config(parallel__strategy="zero3"), index, 2)
    with pytest.raises(ConfigError, match="zero_optimization.stage=3, wanted 2"):
        check_run(
            train_config(
                parallel__strategy="zero2", parallel__zero_config=str(tmp_path / "zero.json")
            ),
            index,
            2,
        )
    with pytest.raises(
        ConfigError, match="parallel.strategy='zero1': DeepSpeed hands an optimizer flat partitions"
    ):
        check_run(train_config(parallel__strategy="zero1", optimizer__kind="muon"), index, 2)
