"""Plan file of an unfinished data folder: its first file, which ties the folder to one plan."""

from __future__ import annotations

import time
from pathlib import Path

from lpl_pretrain.encoding.plan import Plan
from lpl_pretrain.encoding.publish import publish_new
from lpl_pretrain.encoding.writer import RECORDS
from lpl_pretrain.errors import DataError

PLAN_NAME = "plan.txt"
RETRY_S = 0.1
MAX_TRIES = 50


def create_plan_file(folder: Path, plan: Plan) -> None:
    """Creates the plan file exclusively, before any other file of the folder.

    Raises DataError if the folder has the file of another plan: a folder never mixes samples of two
    configurations.
    """
    for _ in range(MAX_TRIES):
        try:
            (folder / RECORDS).mkdir(parents=True, exist_ok=True)
            publish_new(folder / RECORDS / PLAN_NAME, [plan.identity.encode()])
            break
        except FileNotFoundError:
            continue  # another process finished this folder, and was removing its records
        except OSError as error:
            raise DataError(
                f"output={folder}: cannot be written ({error}): name another output"
            ) from None
    check_plan(folder, plan)


def check_plan(folder: Path, plan: Plan) -> None:
    """Raises DataError if the folder is unfinished and belongs to another plan."""
    identity = ""
    for _ in range(MAX_TRIES):  # without hard links the file may appear before its content
        try:
            identity = (folder / RECORDS / PLAN_NAME).read_text(errors="replace")
        except FileNotFoundError:
            return
        if len(identity) >= len(plan.identity):
            break
        time.sleep(RETRY_S)
    if identity == plan.identity:
        return
    inputs = "other inputs"
    if identity == plan.earlier_identity:
        inputs = "an earlier version, which ignored colour profiles"
    raise DataError(
        f"output={folder}: holds the unfinished work of {inputs} (plan {identity[:12]} there, "
        f"{plan.identity[:12]} now): go on with those, name another output, or remove that folder"
    )
