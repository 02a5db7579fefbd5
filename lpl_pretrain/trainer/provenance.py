"""Where a run came from: code, versions, command, machine, data; written once, when the run starts."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lpl_pretrain.config.dataset import DatasetIndex

PACKAGES = ("lpl-pretrain", "torch", "deepspeed", "diffusers", "timm", "webdataset", "numpy")


def describe(index: DatasetIndex, world_size: int, device: str) -> dict[str, Any]:
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "argv": sys.argv,
        "world_size": world_size,
        "device": device,
        "host": platform.node(),
        "platform": platform.platform(),
        "data_fingerprint": index.fingerprint,
        "data_samples": index.samples,
        "autoencoder_identity": index.autoencoder.identity,
    }


def write_once(path: Path, facts: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(facts, indent=2) + "\n")


def _git(*arguments: str) -> str | None:
    """Of the checkout that this code runs from; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
