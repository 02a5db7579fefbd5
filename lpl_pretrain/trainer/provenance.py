"""Provenance of a run: provenance.json lists its starts, each with code, versions, command,
machines and data.

A start is listed once it makes steps.  The file is replaced as a whole, by the process that holds
the run's lease, so no kill leaves part of it.  Older versions wrote one object, about the first
start: it stays as the first entry.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.runtime.atomic import atomic_write_json
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.source_hash import source_hash

PACKAGES = ("lpl-pretrain", "torch", "deepspeed", "diffusers", "timm", "webdataset", "numpy")
DIFF = "git_diff"
"""Key that an entry lacks where its value is that of the entry before."""


def describe(
    config: TrainConfig,
    index: DatasetIndex,
    *,
    step: int,
    hosts: Sequence[str],
    device: str,
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Describe a start, for `append`.

    `step`: updates made before it.  `hosts`: one name per rank.  `changes`: in the configuration
    since the last start.
    """
    return {
        "time_s": time.time(),
        "step": step,
        "world_size": len(hosts),
        "strategy": config.parallel.strategy.value,
        "device": device,
        "hosts": list(dict.fromkeys(hosts)),
        "config_changes": changes,
        "argv": sys.argv,
        "code": source_hash(),
        "git_commit": _git("rev-parse", "HEAD"),
        DIFF: _git("diff", "HEAD"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "data_fingerprint": index.fingerprint,
        "data_samples": index.samples,
        "autoencoder_identity": index.autoencoder.identity,
    }


def append(path: Path, start: dict[str, Any]) -> None:
    """Add a start to the file; an unreadable file is first renamed, not overwritten."""
    starts: list[dict[str, Any]] = []
    if path.is_file():
        try:
            entries = json.loads(path.read_text())
            if isinstance(entries, dict):
                entries = [entries]
            starts = [entry for entry in entries if isinstance(entry, dict)]
        except (ValueError, TypeError) as problem:
            aside = path.with_name(f"{path.stem}.unreadable.{int(time.time())}.json")
            path.rename(aside)
            log.warning("%s: not a list of starts (%s): kept as %s", path, problem, aside.name)
    diffs = [entry[DIFF] for entry in starts if DIFF in entry]
    if diffs and diffs[-1] == start[DIFF]:
        start = {key: value for key, value in start.items() if key != DIFF}
    atomic_write_json(path, [*starts, start])


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout that this code runs from; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=here, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
