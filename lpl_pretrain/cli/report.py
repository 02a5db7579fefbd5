"""`lpl-pretrain report RUN`: one self-contained page from a run's files."""

from __future__ import annotations

from pathlib import Path

from lpl_pretrain.config.rundir import RunDir


def run(run: str) -> None:
    from lpl_pretrain.report.page import write_report  # matplotlib: not for --help

    path = write_report(RunDir(Path(run)))
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
