"""Nodes that the preflight found unfit: why, and how the job goes on without them."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterable
from typing import Any

from launch.folder import JobFolder
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import UNFIT


def unfit_nodes(exits: Iterable[dict[str, Any]], run_dir: RunDir) -> dict[str, str]:
    """Why, by the scheduler's name of the node: ranks say that they are unfit, the preflight's
    report says why.
    """
    nodes = {found["rank"]: found["host"] for found in exits if found["status"] == UNFIT}
    report = (
        json.loads(run_dir.preflight.read_text())
        if nodes and run_dir.preflight.is_file()
        else {"findings": []}
    )
    reasons = dict.fromkeys(nodes.values(), "see the log")
    for finding in report["findings"]:
        if finding["fault"] == "node" and finding["ranks"][0] in nodes:
            why = f"{finding['check']}: found {finding['found']}, wanted {finding['wanted']}"
            reasons[nodes[finding["ranks"][0]]] = " ".join(why.split())
    return reasons


def exclude(folder: JobFolder, job: str, nodes: Iterable[str], already: str) -> str | None:
    """Also when the job is submitted again.  Nothing is excluded where the job could never start
    then: the scheduler's words.

    `already`: the scheduler's own list, which a person may have made longer since submission; ""
    where it says none.
    """
    from launch.submit import sbatch_error  # imports submitit

    record = folder.read_raw_record()
    record["profile"]["exclude"] = excluded = [
        *([already] if already else record["profile"]["exclude"]),
        *nodes,
    ]
    script = folder.path / f"{job}_submission.sh"
    command = ["sbatch", "--test-only", f"--exclude={','.join(excluded)}", str(script)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        return sbatch_error(asked.stderr)
    folder.write_record(record)
    return None


def requeue(job: str, excluded: list[str]) -> None:
    """The scheduler takes no list of excluded nodes for a job that runs, so it gets one for the job
    that waits again.

    By then it has begun to end this very process, which has KillWait seconds left.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.run(["scontrol", "requeue", job], check=False)
    if excluded:
        subprocess.run(
            ["scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(excluded)}"], check=False
        )
