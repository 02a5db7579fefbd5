"""The command line: parse, then call one function.  No torch here, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from lpl_pretrain import __version__
from lpl_pretrain.errors import LPLError, StorageError, exit_status, is_transient

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def commands() -> None:
    """Pretrain latent diffusion models with the Latent Perceptual Loss.

    \b
    lpl-pretrain encode   configs/encode/emoji.yaml             pictures -> latents; the same command goes on
    lpl-pretrain data show data/emoji_latents                   what is in them
    lpl-pretrain train    configs/train/emoji_dit_lpl.yaml      latents -> checkpoints; the same command resumes
    lpl-pretrain evaluate runs/emoji_dit_lpl configs/evaluate/emoji.yaml
    lpl-pretrain report   runs/emoji_dit_lpl                    one page with everything

    On several processes: torchrun --nproc-per-node 2 -m lpl_pretrain train CONFIG
    """


@commands.command()
@click.argument("config")
@OVERRIDES
@click.option(
    "--verify", is_flag=True, help="Re-read the finished folder and compare it with its source; exit status 1 when unsound."
)
@click.option("--pictures", type=int, default=32, show_default=True, help="How many --verify decodes and compares.")
def encode(config: str, overrides: tuple[str, ...], verify: bool, pictures: int) -> None:
    """Encode pictures into latent shards, as CONFIG (configs/encode/*.yaml) says; killed and started again, it goes on."""
    from lpl_pretrain.cli import encode as command
    from lpl_pretrain.config.encode import EncodeConfig
    from lpl_pretrain.config.load import load_config

    loaded = load_config(EncodeConfig, config, overrides)
    if verify:
        sys.exit(0 if command.verify(loaded, pictures) else 1)
    command.run(loaded)


@commands.group()
def data() -> None:
    """Look into folders of latents."""


@data.command()
@click.argument("folder")
@click.option("--autoencoder", help="The one that made the latents; where the index says when absent.")
@click.option("--output", help="PNG with pictures decoded from the latents; FOLDER/contact_sheet.png when absent.")
@click.option("--pictures", type=int, default=64, show_default=True, help="0 writes no PNG.")
def show(folder: str, autoencoder: str | None, output: str | None, pictures: int) -> None:
    """Print counts, classes, buckets, statistics and disk use of FOLDER, and draw a contact sheet."""
    from lpl_pretrain.cli import data as command

    command.show(folder, autoencoder=autoencoder, output=output, pictures=pictures)


@commands.command()
@click.argument("config")
@OVERRIDES
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train what CONFIG (configs/train/*.yaml) describes, or go on where its run stopped."""
    from lpl_pretrain.cli import train as command

    command.run(config, overrides)


@commands.command()
@click.argument("run")
@click.option("--step", type=int, help="Checkpoint to draw from; the newest when absent.")
@click.option("--guidance-scale", type=float, default=2.5, show_default=True)
@click.option("--images", type=int, default=64, show_default=True)
@click.option("--sampler", help="ddim or dpmpp_2m (eps, v); euler or heun (flow).")
@click.option("--sampler-steps", type=int, default=50, show_default=True)
@click.option("--shift", type=float, default=1.0, show_default=True, help="Of the times that euler and heun visit.")
@click.option("--guidance-interval", type=(float, float), metavar="LOW HIGH", help="Noise levels between which to guide.")
@click.option("--guide", metavar="RUN", help="A weaker run to be guided away from, instead of from the null class.")
@click.option("--guide-step", type=int, help="Its checkpoint; the newest when absent.")
@click.option("--prompt", "prompts", multiple=True, help="Instead of captions of the data; several for several pictures.")
@click.option(
    "--text-encoder", "text_encoders", multiple=True, metavar="NAME=FOLDER", help="For --prompt where embeddings were stored."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--format", type=click.Choice(["grid", "png", "tar"]), default="grid", show_default=True)
@click.option("--output", help="File or folder to write; in the run's samples/ when absent.")
def sample(run: str, **options: Any) -> None:
    """Draw pictures from the EMA weights of RUN: one sheet, a folder of PNGs that say where they come from, or a WebDataset tar."""
    from lpl_pretrain.cli import sample as command

    sampler = sampler_of(options)
    command.run(run, sampler=sampler, **options)


def sampler_of(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the keys of SamplerConfig that were given out of the options of `sample`."""
    asked = {"kind": "sampler", "steps": "sampler_steps", "shift": "shift", "guidance_interval": "guidance_interval"}
    found = {key: options.pop(name) for key, name in asked.items()}
    return {key: value for key, value in found.items() if value is not None}


@commands.command()
@click.argument("run")
@click.argument("protocol")
@OVERRIDES
@click.option("--step", type=int, help="Checkpoint to score, again if it has a score; all that have none when absent.")
@click.option("--pending", is_flag=True, help="With --step: not again.")
@click.option("--watch", is_flag=True, help="Go on until training has ended and everything is scored.")
def evaluate(run: str, protocol: str, overrides: tuple[str, ...], step: int | None, pending: bool, watch: bool) -> None:
    """Score the checkpoints of RUN that PROTOCOL (configs/evaluate/*.yaml) has not scored yet."""
    from lpl_pretrain.cli import evaluate as command

    command.run(run, protocol, overrides=list(overrides), step=step, pending=pending, watch=watch)


@commands.command()
@click.argument("protocol")
@click.argument("output")
@OVERRIDES
@click.option("--resolution-px", type=int, required=True, help="Of the pictures, as of the run that will be compared with them.")
def reference(protocol: str, output: str, overrides: tuple[str, ...], resolution_px: int) -> None:
    """Write statistics of the real pictures of PROTOCOL to OUTPUT (.safetensors), for its `reference`."""
    from lpl_pretrain.cli import reference as command

    command.run(protocol, output, overrides=list(overrides), resolution_px=resolution_px)


@commands.command()
@click.argument("run")
@click.option("--weights", default="ema", show_default=True, help="ema, raw, or an average that the run tracks: ema_power_0.050.")
@click.option("--sigma-rel", type=float, help="Make the power-function average of this length from the run's snapshots instead.")
@click.option("--step", type=int, help="Checkpoint, or last snapshot; the newest when absent.")
@click.option("--best", metavar="PROTOCOL", help="The checkpoint and the weights that this protocol found best.")
@click.option("--format", type=click.Choice(["file", "diffusers"]), default="file", show_default=True)
@click.option("--output", required=True, help="Safetensors file, or folder, to write.")
def export(run: str, **options: Any) -> None:
    """Write the weights of RUN as one safetensors file in our names, or as a pipeline folder that diffusers loads."""
    from lpl_pretrain.cli import export as command

    command.run(run, **options)


@commands.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--output", help="HTML file to write; in the run, or in the folder that holds all the runs, when absent.")
def report(runs: tuple[str, ...], output: str | None) -> None:
    """Write RUN/report.html: one self-contained page with curves, scores, pictures and provenance.

    Of several runs, or of a folder that holds them: comparison.html, one page on which they stand side by side.
    """
    from lpl_pretrain.cli import report as command

    command.run(runs, output)


@commands.command()
@click.argument("run")
def audit(run: str) -> None:
    """Check that every update of RUN, trained with log.samples=true, was made of its samples: none missed, none seen twice."""
    from lpl_pretrain.cli import audit as command

    command.run(run)


@commands.command()
def doctor() -> None:
    """Say what this machine can do, and what is missing."""
    from lpl_pretrain.cli import doctor as command

    sys.exit(command.run())


def main() -> None:
    run(commands)


def run(group: click.Group) -> None:
    """Errors that a user can act on are printed without a traceback.  What is written is not for all the world to change."""
    os.umask(os.umask(0o077) | 0o002)
    try:
        group()
    except LPLError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(exit_status(error))
    except OSError as error:
        if not is_transient(error):
            raise
        click.echo(f"StorageError: {StorageError.of(error)}", err=True)
        sys.exit(StorageError.status)
