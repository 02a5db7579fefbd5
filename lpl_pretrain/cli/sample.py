"""`lpl-pretrain sample RUN`: a grid of pictures from a checkpoint's EMA weights."""

from __future__ import annotations

from pathlib import Path

from lpl_pretrain.config.evaluation import SAMPLERS
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import SamplerConfig
from lpl_pretrain.errors import ConfigError

BATCH_SIZE = 64


def run(
    run: str, *, step: int | None, guidance_scale: float, images: int, sampler_steps: int, seed: int, output: str | None
) -> None:
    if images < 1 or sampler_steps < 1:
        raise ConfigError(f"--images={images} --sampler-steps={sampler_steps}: both are at least 1")
    run_dir = RunDir(Path(run))
    kind = SAMPLERS[load_run_config(run_dir).diffusion.prediction][0]
    sampler = SamplerConfig.model_validate({"kind": kind, "steps": sampler_steps})
    import torch  # not for --help

    from lpl_pretrain.evaluation.files import publish_grid
    from lpl_pretrain.evaluation.load import open_run, pick_device
    from lpl_pretrain.runtime.log import progress

    step = run_dir.complete_step(step)
    trained = open_run(run_dir, pick_device())
    trained.load(step, "ema")
    pixels = []
    with progress(images, "img", f"step {step}") as bar:
        for batch in trained.generator.pixels(images, BATCH_SIZE, seed=seed, sampler=sampler, guidance_scale=guidance_scale):
            pixels.append(batch.cpu())
            bar.update(len(batch))
    path = Path(output) if output else run_dir.samples(step, f"sample_w{guidance_scale:g}_seed{seed}")
    publish_grid(path, torch.cat(pixels))
    print(path)
