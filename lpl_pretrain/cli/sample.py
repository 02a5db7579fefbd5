"""`lpl-pretrain sample RUN`: pictures from a checkpoint's weights, as a grid, as single PNGs, or as
a WebDataset tar.
"""

from __future__ import annotations

from lpl_pretrain.config.evaluation import SAMPLERS, check_sampler
from lpl_pretrain.config.load import load_run_config, validate
from lpl_pretrain.config.names import name_problem
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.protocol import GuideConfig, SamplerConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError

BATCH_SIZE = 64
SUFFIX = {"grid": ".png", "png": "", "tar": ".tar"}


def run(
    run: str,
    *,
    step: int | None,
    guidance_scale: float,
    images: int,
    sampler: dict[str, object],
    guide: str | None,
    guide_step: int | None,
    prompts: tuple[str, ...],
    text_encoders: tuple[str, ...],
    seed: int,
    format: str,
    output: str | None,
) -> None:
    """Runs `lpl-pretrain sample`.  `sampler`: keys of SamplerConfig; without `kind` the first one
    that suits the prediction type of the run.
    """
    run_dir = RunDir(expand(run))
    _, chosen, weak, folders = check(
        run_dir, step, images, sampler, guide, guide_step, text_encoders
    )
    import torch  # not for --help

    from lpl_pretrain.evaluation.captions import Prompts
    from lpl_pretrain.evaluation.image_files import write_grid, write_pngs, write_tar
    from lpl_pretrain.evaluation.trained_run import open_run, pick_device
    from lpl_pretrain.runtime.log import progress

    asked = Prompts(prompts, folders) if prompts else None
    trained = open_run(run_dir, pick_device(), weak, asked)
    step = trained.load(step, "ema")
    found = []
    with progress(images, "img", f"step {step}") as bar:
        for first in range(0, images, BATCH_SIZE):
            batch = range(first, min(first + BATCH_SIZE, images))
            found.append(
                trained.generator.pixels(
                    batch, seed=seed, sampler=chosen, guidance_scale=guidance_scale
                ).cpu()
            )
            bar.update(len(batch))
    pixels = torch.cat(found)
    default = run_dir.samples(step, f"sample_w{guidance_scale:g}_seed{seed}")
    path = (
        expand(output)
        if output
        else default.with_name(default.name.removesuffix(".png") + SUFFIX[format])
    )
    try:
        if format == "grid":
            write_grid(path, pixels)
        else:
            shared = {
                "run": str(run_dir.path),
                "step": step,
                "seed": seed,
                "guidance_scale": guidance_scale,
                "sampler": chosen.kind,
            }
            facts = [{**shared, **fact} for fact in trained.sample_metadata(seed, range(images))]
            (write_pngs if format == "png" else write_tar)(path, [pixels], facts)
    except OSError as error:
        raise ConfigError(
            f"--output={path}: cannot be written: {error.strerror or error}"
        ) from None
    print(path)


def check(
    run_dir: RunDir,
    step: int | None,
    images: int,
    sampler: dict[str, object],
    guide: str | None,
    guide_step: int | None,
    text_encoders: tuple[str, ...],
) -> tuple[int, SamplerConfig, GuideConfig | None, dict[str, str]]:
    """Checked arguments: (checkpoint, sampler, guide, folders of text encoders).  Raises
    ConfigError or CheckpointError.  Damage of the checkpoint shows when it is read.
    """
    if images < 1:
        raise ConfigError(f"--images={images}: at least 1")
    prediction = load_run_config(run_dir).diffusion.prediction
    chosen = validate(SamplerConfig, {"kind": SAMPLERS[prediction][0], **sampler}, where="sample")
    check_sampler(prediction, chosen)
    weak = (
        None
        if guide is None
        else validate(GuideConfig, {"run": guide, "step": guide_step}, where="--guide")
    )
    return (
        run_dir.complete_step(step),
        chosen,
        weak,
        dict(_name_and_folder(given) for given in text_encoders),
    )


def _name_and_folder(given: str) -> tuple[str, str]:
    name, equals, folder = given.partition("=")
    if not (name and equals and folder):
        raise ConfigError(
            f"--text-encoder {given}: wanted NAME=FOLDER, as in clip_l=/data/models/clip-l"
        )
    if problem := name_problem(name):
        raise ConfigError(f"--text-encoder {given}: its name {problem}")
    return name, str(expand(folder))
