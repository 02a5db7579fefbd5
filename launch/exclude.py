"""Excluded nodes: which nodes the preflight found unfit, and how the job excludes them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from typing import Any

from launch.job_folder import JobFolder
from launch.slurm import sbatch_error
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import UNFIT


def unfit_nodes(exits: Iterable[dict[str, Any]], run_dir: RunDir) -> dict[str, str]:
    """{SLURM's name of an unfit node: reason}.

    A rank's exit status says that its node is unfit, the preflight's report says why.
    """
    nodes = {record["rank"]: record["host"] for record in exits if record["status"] == UNFIT}
    reasons = dict.fromkeys(nodes.values(), "see the log")
    if not nodes or not run_dir.preflight.is_file():
        return reasons
    for finding in json.loads(run_dir.preflight.read_text())["findings"]:
        if finding["fault"] == "node" and finding["ranks"][0] in nodes:
            reason = f"{finding['check']}: found {finding['found']}, wanted {finding['wanted']}"
            reasons[nodes[finding["ranks"][0]]] = " ".join(reason.split())
    return reasons


def exclude(
    folder: JobFolder, job: str, nodes: Iterable[str], excluded_in_slurm: str
) -> str | None:
    """Exclude `nodes` in the job's record, so that `launch resume` excludes them too.

    Returns None; or sbatch's message when the job could never start without these nodes, in which
    case the record stays as it is.  `excluded_in_slurm`: SLURM's own list, which the user may have
    extended since submission; "" when it has none.
    """
    record = folder.read_raw_record()
    before = [excluded_in_slurm] if excluded_in_slurm else record["profile"]["exclude"]
    excluded = [*before, *nodes]
    script = folder.path / f"{job}_submission.sh"
    test = subprocess.run(
        ["sbatch", "--test-only", f"--exclude={','.join(excluded)}", str(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    if test.returncode:
        return sbatch_error(test.stderr)
    record["profile"]["exclude"] = excluded
    folder.write_record(record)
    return None
