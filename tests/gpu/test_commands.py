"""`encode`, `train`, `sample` and `evaluate` lpl_on a GPU give the results of the CPU."""

from __future__ import annotations

import os

import pytest

from lpl_pretrain.config.load import ASSETS
from tests.support.commands import ROOT, lpl, metric_lines
from tests.support.latents import draw_images

TRAIN = """
name: gpu
steps: 6
autoencoder: asset:autoencoder_emoji
data: {{folder: {folder}/latents}}
model: {{width: 64, depth: 2, heads: 2}}
diffusion: {{prediction: flow, schedule: rectified_flow, timesteps: {{distribution: logit_normal}}}}
lpl: {{target_fraction: 0.2, gate: {{noise_level_below: 1.0}}, start_step: 1, calibration_steps: 2}}
optimizer: {{lr: 1.0e-3}}
batch: {{global_batch_size: 8}}
checkpoint: {{every_steps: 2}}
log: {{every_steps: 1}}
ema: {{sigma_rel: [0.05, 0.1]}}
"""
ZERO2 = f"parallel.zero_config={ROOT}/configs/zero/zero2.json"
ZERO3 = f"parallel.zero_config={ROOT}/configs/zero/zero3.json"
STRATEGIES = {
    "local": [],
    "ddp": ["parallel.strategy=ddp"],
    "fsdp2": ["parallel.strategy=fsdp2"],
    "fsdp2_blocks": ["parallel.strategy=fsdp2", "parallel.activation_checkpointing=blocks"],
    "zero2": ["parallel.strategy=zero", ZERO2],
    "zero3": ["parallel.strategy=zero", ZERO3],
}
FAST = [
    "parallel.precision=bf16",
    "parallel.compile=true",
    "lpl.compile=true",
    "lpl.decoder_precision=bf16",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    draw_images(folder / "images", side=64)
    for device, visible in (("latents", None), ("latents_cpu", "")):
        config = folder / f"{device}.yaml"
        config.write_text(
            f"source: {folder}/images\noutput: {folder}/{device}\nautoencoder: "
            f"{ASSETS}/autoencoder_emoji\nresolution_px: 64\n"
        )
        lpl_on(visible, "encode", config)
    (folder / "train.yaml").write_text(TRAIN.format(folder=folder))
    return folder


def lpl_on(visible, *arguments, **options):
    """Run a command with CUDA_VISIBLE_DEVICES=`visible`; "" hides the GPU, None changes nothing."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        return lpl(*arguments, **options)
    finally:
        if visible is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def logged(run, key="loss/total"):
    """Map each step that logs `key` to its value; a key may begin later than the first step."""
    return {line["step"]: line[key] for line in metric_lines(run) if key in line}


@pytest.fixture(scope="module")
def cpu_run(folder):
    lpl_on("", "train", folder / "train.yaml", f"run_dir={folder}/cpu")
    return folder / "cpu"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_as_the_cpu_does(folder, cpu_run, strategy):
    run = folder / strategy
    lpl("train", folder / "train.yaml", f"run_dir={run}", *STRATEGIES[strategy])
    for key in ("loss/total", "loss/lpl", "grad_norm"):
        got = logged(run, key)
        wanted = logged(cpu_run, key)
        assert got.keys() == wanted.keys()
        assert got == pytest.approx(wanted, rel=2e-3), key
    line = metric_lines(run)[-1]
    assert line["mfu"] > 0 and line["peak_gib"] > 0


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_compiled_bf16_is_near_and_resumes(folder, cpu_run, strategy):
    whole, parts = folder / f"{strategy}_fast", folder / f"{strategy}_parts"
    lpl("train", folder / "train.yaml", f"run_dir={whole}", *STRATEGIES[strategy], *FAST)
    assert logged(whole) == pytest.approx(logged(cpu_run), rel=5e-2)
    lpl("train", folder / "train.yaml", f"run_dir={parts}", *STRATEGIES[strategy], *FAST, "steps=4")
    lpl("train", folder / "train.yaml", f"run_dir={parts}", *STRATEGIES[strategy], *FAST)
    assert [line["step"] for line in metric_lines(parts) if line.get("event") == "resumed"] == [4]
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-3)


def test_float8_trains(folder, cpu_run):
    run = folder / "float8"
    lpl(
        "train",
        folder / "train.yaml",
        f"run_dir={run}",
        *STRATEGIES["fsdp2"],
        "parallel.precision=fp8",
        "parallel.compile=true",
    )
    assert logged(run) == pytest.approx(logged(cpu_run), rel=0.1)


def test_samples_and_evaluates(folder, cpu_run):
    (folder / "quick.yaml").write_text(
        "name: quick\n"
        "images: 16\n"
        "batch_size: 8\n"
        "sampler: {kind: euler, steps: 3}\n"
        "guidance_scales: [1.0, 2.0]\n"
        f"reference: {folder}/images\n"
        "grid_images: 4\n"
    )
    lpl(
        "sample", cpu_run, "--images", "4", "--sampler-steps", "2", "--output", folder / "sheet.png"
    )
    assert (folder / "sheet.png").stat().st_size > 1000
    lpl("evaluate", cpu_run, folder / "quick.yaml")
