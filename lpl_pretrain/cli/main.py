"""The command line: parse, then call one function.  No torch here, so that `--help` answers at
once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from lpl_pretrain import __version__
from lpl_pretrain.errors import LPLError, StorageError, exit_status, is_lost_rank
from lpl_pretrain.runtime.command import command_line
from lpl_pretrain.runtime.preempt import (
    INTERRUPTED,
    Interrupted,
    StopRequest,
    stop_request,
    write_stderr,
)
from lpl_pretrain.runtime.torchrun import peer_failed, record_error
from lpl_pretrain.runtime.world import World

LONGEST_CONSEQUENCE = 160
"""Characters of an error that is the consequence of Ctrl-C, or of another rank's end."""
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def commands() -> None:
    """Pretrain latent diffusion models with the Latent Perceptual Loss.

    \b
    lpl-pretrain encode   configs/encode/emoji.yaml             images -> latents
    lpl-pretrain data show data/emoji_latents                   counts, statistics, a contact sheet
    lpl-pretrain train    configs/train/emoji_dit_lpl.yaml      latents -> checkpoints
    lpl-pretrain evaluate runs/emoji_dit_lpl configs/evaluate/emoji.yaml
    lpl-pretrain report   runs/emoji_dit_lpl                    one page with everything

    encode, train and evaluate resume when the same command is run again.

    On several processes: torchrun --nproc-per-node 2 -m lpl_pretrain train CONFIG
    """


@commands.command()
@click.argument("config")
@OVERRIDES
@click.option(
    "--verify",
    is_flag=True,
    help="Re-read the finished folder and compare it with its source; exit status 1 when unsound.",
)
@click.option(
    "--pictures",
    type=int,
    default=32,
    show_default=True,
    help="How many --verify decodes and compares.",
)
def encode(config: str, overrides: tuple[str, ...], verify: bool, pictures: int) -> None:
    """Encode images into latent shards by CONFIG (configs/encode/*.yaml); run again, it resumes."""
    from lpl_pretrain.cli import encode as command
    from lpl_pretrain.config.encode import EncodeConfig
    from lpl_pretrain.config.load import load_config

    loaded = load_config(EncodeConfig, config, overrides)
    if verify:
        sys.exit(0 if command.verify(loaded, pictures) else 1)
    goes_on("finished parts are kept")
    command.run(loaded)


@commands.group()
def data() -> None:
    """Look into folders of latents."""


@data.command()
@click.argument("folder")
@click.option(
    "--autoencoder", help="The one that made the latents; where the index says when absent."
)
@click.option(
    "--output",
    help="PNG with images decoded from the latents; FOLDER/contact_sheet.png when absent.",
)
@click.option("--pictures", type=int, default=64, show_default=True, help="0 writes no PNG.")
def show(folder: str, autoencoder: str | None, output: str | None, pictures: int) -> None:
    """Print counts, classes, buckets, statistics and disk use of FOLDER; draw a contact sheet."""
    from lpl_pretrain.cli import data as command

    command.show(folder, autoencoder=autoencoder, output=output, pictures=pictures)


@data.command()
@click.argument("folder")
def seal(folder: str) -> None:
    """Compare FOLDER's index with its shards, and give an index of an earlier version its
    checksums.
    """
    from lpl_pretrain.cli import data as command

    command.seal(folder)


@commands.command()
@click.argument("config")
@OVERRIDES
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train what CONFIG (configs/train/*.yaml) describes, or resume its run."""
    from lpl_pretrain.cli import train as command

    command.run(config, overrides)


@commands.command()
@click.argument("run")
@click.option("--step", type=int, help="Checkpoint to draw from; the newest when absent.")
@click.option("--guidance-scale", type=float, default=2.5, show_default=True)
@click.option("--images", type=int, default=64, show_default=True)
@click.option("--sampler", help="ddim or dpmpp_2m (eps, v); euler or heun (flow).")
@click.option("--sampler-steps", type=int, default=50, show_default=True)
@click.option(
    "--shift",
    type=float,
    default=1.0,
    show_default=True,
    help="Of the times that euler and heun visit.",
)
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="Noise levels between which to guide.",
)
@click.option(
    "--guide",
    metavar="RUN",
    help="A weaker run to be guided away from, instead of from the null class.",
)
@click.option("--guide-step", type=int, help="Its checkpoint; the newest when absent.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Instead of captions of the data; several for several pictures.",
)
@click.option(
    "--text-encoder",
    "text_encoders",
    multiple=True,
    metavar="NAME=FOLDER",
    help="For --prompt where embeddings were stored.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--format", type=click.Choice(["grid", "png", "tar"]), default="grid", show_default=True
)
@click.option("--output", help="File or folder to write; in the run's samples/ when absent.")
def sample(run: str, **options: Any) -> None:
    """Draw images from the EMA weights of RUN: one grid, a folder of PNGs with their metadata, or a
    WebDataset tar.
    """
    from lpl_pretrain.cli import sample as command

    sampler = sampler_of(options)
    command.run(run, sampler=sampler, **options)


def sampler_of(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the keys of SamplerConfig that were given out of the options of `sample`."""
    asked = {
        "kind": "sampler",
        "steps": "sampler_steps",
        "shift": "shift",
        "guidance_interval": "guidance_interval",
    }
    found = {key: options.pop(name) for key, name in asked.items()}
    return {key: value for key, value in found.items() if value is not None}


@commands.command()
@click.argument("run")
@click.argument("protocol")
@OVERRIDES
@click.option(
    "--step",
    type=int,
    help="Checkpoint to score, again if it has a score; all that have none when absent.",
)
@click.option("--pending", is_flag=True, help="With --step: not again.")
@click.option(
    "--watch",
    is_flag=True,
    help="Wait for new checkpoints until training has ended and all are scored.",
)
def evaluate(
    run: str,
    protocol: str,
    overrides: tuple[str, ...],
    step: int | None,
    pending: bool,
    watch: bool,
) -> None:
    """Score the checkpoints of RUN that PROTOCOL (configs/evaluate/*.yaml) has not scored yet."""
    from lpl_pretrain.cli import evaluate as command

    goes_on("features that were made are kept")
    command.run(run, protocol, overrides=list(overrides), step=step, pending=pending, watch=watch)


@commands.command()
@click.argument("protocol")
@click.argument("output")
@OVERRIDES
@click.option(
    "--resolution-px",
    type=int,
    required=True,
    help="Of the pictures, as of the run that will be compared with them.",
)
def reference(protocol: str, output: str, overrides: tuple[str, ...], resolution_px: int) -> None:
    """Write statistics of the real pictures of PROTOCOL to OUTPUT (.safetensors), for its
    `reference`.
    """
    from lpl_pretrain.cli import reference as command

    command.run(protocol, output, overrides=list(overrides), resolution_px=resolution_px)


@commands.command()
@click.argument("run")
@click.option(
    "--weights",
    default="ema",
    show_default=True,
    help="ema, raw, or an average that the run tracks: ema_power_0.050.",
)
@click.option(
    "--sigma-rel",
    type=float,
    help="Make the power-function average of this length from the run's snapshots instead.",
)
@click.option("--step", type=int, help="Checkpoint, or last snapshot; the newest when absent.")
@click.option(
    "--best",
    metavar="PROTOCOL",
    help="The checkpoint and the weights that this protocol found best.",
)
@click.option(
    "--format", type=click.Choice(["file", "diffusers"]), default="file", show_default=True
)
@click.option("--output", required=True, help="Safetensors file, or folder, to write.")
def export(run: str, **options: Any) -> None:
    """Write the weights of RUN as one safetensors file in our names, or as a pipeline folder that
    diffusers loads.
    """
    from lpl_pretrain.cli import export as command

    command.run(run, **options)


@commands.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output",
    help="HTML file to write; in the run, or in the folder that holds all the runs, when absent.",
)
def report(runs: tuple[str, ...], output: str | None) -> None:
    """Write RUN/report.html: one self-contained page with curves, scores, pictures and provenance.

    Of several runs, or of a folder that holds them: comparison.html, one page on which they stand
    side by side.
    """
    from lpl_pretrain.cli import report as command

    command.run(runs, output)


@commands.command()
@click.argument("run")
def audit(run: str) -> None:
    """Check that every update of RUN, trained with log.sample_indices=true, trained on its samples:
    none missing, none twice.
    """
    from lpl_pretrain.cli import audit as command

    command.run(run)


@commands.command("zero-config")
@click.argument("file")
@click.option(
    "--output", metavar="FILE", help="JSON to write, which must not exist; stdout when absent."
)
def zero_config(file: str, output: str | None) -> None:
    """Write what is accepted of FILE, a DeepSpeed JSON that was written elsewhere, for
    parallel.zero_config.

    Each key that was taken out is printed with its value and with the key of our configuration that
    says it instead.
    """
    from lpl_pretrain.cli import zero_config as command

    command.run(file, output)


@commands.command()
@click.argument("kind", type=click.Choice(["train", "encode", "evaluate", "cluster"]))
def schema(kind: str) -> None:
    """Print the JSON schema of configs/KIND/*.yaml, by which editors complete and check them."""
    from lpl_pretrain.config.json_schema import schema_text

    click.echo(schema_text(kind), nl=False)


@commands.command()
def doctor() -> None:
    """Say what this machine can do, and what is missing."""
    from lpl_pretrain.cli import doctor as command

    sys.exit(command.run())


def main() -> None:
    run(commands)


def run(group: click.Group) -> None:
    """Errors that a user can act on are printed without a traceback; so is Ctrl-C, with the exit
    status 130.

    What is written is not for all the world to change.
    """
    os.umask(os.umask(0o077) | 0o002)
    stop, file = stop_request(), World.error_file()
    stop.under_torchrun, stop.peer_failed = (
        World.under_torchrun(),
        lambda: file is not None and peer_failed(file),
    )
    with suppress(LPLError):  # a command that needs ranks says what is wrong with them
        stop.prints = World.from_environment().rank == 0
    try:
        run_command(group, stop, file)
    except Interrupted as interruption:
        if stop.prints:
            write_stderr(str(interruption))
        end(INTERRUPTED)


def run_command(group: click.Group, stop: StopRequest, file: Path | None) -> None:
    """Raises Interrupted, and what is a mistake of this program's; ends the process where the input
    is at fault.
    """
    try:
        group(standalone_mode=file is None)
    except LPLError as error:
        refuse(f"{type(error).__name__}: {error}", exit_status(error), file)
    except click.ClickException as error:  # under torchrun; otherwise click prints it
        error.show(file=(shown := io.StringIO()))
        refuse(shown.getvalue().rstrip(), error.exit_code, file)
    except Exception as error:
        consequence = f"{type(error).__name__}: {first_line(error)}"
        if stop.interrupted:  # the other ranks may be gone
            raise Interrupted(f"{stop.exit_message} ({consequence})") from error
        if stop.peer_failed():  # the connection to that rank is gone
            end(1)
        if (
            is_lost_rank(error) and file is None
        ):  # torchrun's own report tells of the rank that has ended
            write_stderr(
                "another rank has ended or cannot be reached any more; its own error says why "
                f"({consequence})"
            )
            end(1)
        if (refused := StorageError.of(error)) is not None:
            refuse(f"StorageError: {refused}", StorageError.status, file)
        raise


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:LONGEST_CONSEQUENCE]


def refuse(text: str, status: int, file: Path | None) -> NoReturn:
    """Prints an error; under torchrun leaves that to torchrun, which speaks last
    (runtime/torchrun.py).
    """
    if file is None:
        click.echo(text, err=True)
        sys.exit(status)
    record_error(text, file)
    end(status)


def end(status: int) -> NoReturn:
    """Exits without destructors and without joining threads: both may wait for ranks that are
    gone.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def goes_on(what: str) -> None:
    """After Ctrl-C the command under way can be given again."""
    stop_request().exit_message = f"interrupted: {what}; the same command goes on: {command_line()}"
