"""Under torchrun an input error is printed once, last, without tracebacks: by torchrun, of which
this is a plugin.

torchrun prints a report of its own, inside a traceback of itself, after every failure of a worker.
So a worker prints nothing: it records the error in the file that torchrun names for it, from where
the report takes it.  Where this package is installed, torchrun loads `plugin` (entry point group
torchrun.handlers), which prints the recorded error in the place of that report. It does so only in
a torchrun whose arguments name this package.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

OURS = "lpl_pretrain"
"""Key of a recorded error's text, beside those that torchrun reads."""
NAMES = ("lpl_pretrain", "lpl-pretrain")


def record_error(text: str, file: Path) -> None:
    """Of the ranks of a node that have the same error, one records it: the others' files would
    repeat it in the report.
    """
    first = int(time.time()) - 1  # in whole seconds; before what this error leads other ranks into
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(first)}}
    file.write_text(json.dumps({"message": message, OURS: text}))
    claim = attempt_folder(file) / f".{OURS}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:  # that rank's file was whole by then
        file.unlink(missing_ok=True)


def peer_failed(file: Path) -> bool:
    """Whether a rank of this node has recorded an error: what other ranks run into then is its
    consequence.
    """
    return any(path != file for path in attempt_folder(file).glob("*/error.json"))


def attempt_folder(file: Path) -> Path:
    """Of all ranks of this node: torchrun's files are attempt_N/RANK/error.json."""
    above = file.parent.parent
    return above if above.name.startswith("attempt_") else file.parent


def plugin() -> Callable[..., NoReturn]:
    """Called by torchrun as it starts; what it asks for is a kind of rendezvous, of which there is
    none here.
    """
    if starts_this_package(sys.argv[1:]):
        sys.excepthook = report
    return no_rendezvous


def no_rendezvous(*_: Any) -> NoReturn:
    raise ValueError(f"--rdzv-backend={OURS}: is none; leave it out")


def starts_this_package(arguments: Sequence[str]) -> bool:
    return any(name in argument for argument in arguments for name in NAMES)


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook of torchrun's: recorded errors alone; nothing after a signal, for the workers
    have said what it did.
    """
    failures = getattr(error, "failures", {}).values()
    if texts := dict.fromkeys(
        failure.error_file_data[OURS] for failure in failures if OURS in failure.error_file_data
    ):
        print("\n".join(texts), file=sys.stderr, flush=True)
    elif kind.__name__ != "SignalException":
        sys.__excepthook__(kind, error, trace)
