"""`lpl-pretrain report RUN`: one self-contained page from a run's files, or from those of several
runs side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.rundir import RunDir


def run(runs: Sequence[str], output: str | None = None) -> None:
    from lpl_pretrain.report.compare import (
        find_runs,
        write_comparison,
    )  # matplotlib: not for --help
    from lpl_pretrain.report.page import is_run, write_report

    folders, target = [expand(given) for given in runs], expand(output) if output else None
    if len(folders) == 1 and (is_run(RunDir(folders[0])) or not folders[0].is_dir()):
        path = write_report(RunDir(folders[0]), target)
    else:
        path = write_comparison(find_runs(folders), target)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
