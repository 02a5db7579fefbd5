"""Plugin for torchrun that prints an input error of a worker once, last and without tracebacks.

By default torchrun prints a report of its own, inside its own traceback, after every failure of a
worker.  So a worker prints nothing: it records the error in the file that torchrun names for it.
torchrun loads `plugin` (entry point group torchrun.handlers) wherever this package is installed;
the plugin prints the recorded errors instead of the report.  It does so only in a torchrun whose
arguments name this package.
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

ERROR_KEY = "lpl_pretrain"
"""Key of the text in a recorded error, beside the keys that torchrun reads."""
PACKAGE_NAMES = ("lpl_pretrain", "lpl-pretrain")


def record_error(text: str, file: Path) -> None:
    """Records an error for torchrun in `file`, unless another rank of this node has recorded the
    same text: the report would repeat it.
    """
    # Whole seconds, one earlier: it must precede the errors that this one causes on other ranks.
    timestamp = int(time.time()) - 1
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(timestamp)}}
    file.write_text(json.dumps({"message": message, ERROR_KEY: text}))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    claim = attempt_folder(file) / f".{ERROR_KEY}_{digest}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:  # the other rank had completed its file before it made the claim
        file.unlink(missing_ok=True)


def peer_failed(file: Path) -> bool:
    """Whether another rank of this node has recorded an error, so that an error here is probably
    its consequence.
    """
    return any(path != file for path in attempt_folder(file).glob("*/error.json"))


def attempt_folder(file: Path) -> Path:
    """Folder that all ranks of this node have in common: torchrun's files are
    attempt_N/RANK/error.json.
    """
    grandparent = file.parent.parent
    return grandparent if grandparent.name.startswith("attempt_") else file.parent


def plugin() -> Callable[..., NoReturn]:
    """Installs `print_errors`.  torchrun calls it as it starts and expects a rendezvous backend;
    there is none here, so the result only raises.
    """
    if starts_this_package(sys.argv[1:]):
        sys.excepthook = print_errors
    return no_rendezvous


def no_rendezvous(*_: Any) -> NoReturn:
    raise ValueError("--rdzv-backend=lpl_pretrain: is not a rendezvous backend; omit the option")


def starts_this_package(arguments: Sequence[str]) -> bool:
    return any(name in argument for argument in arguments for name in PACKAGE_NAMES)


def print_errors(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Excepthook for torchrun: prints the recorded errors without torchrun's report.

    Prints nothing after a signal, since the workers have printed its effect.
    """
    failures = getattr(error, "failures", {}).values()
    recorded = [failure.error_file_data for failure in failures]
    texts = dict.fromkeys(data[ERROR_KEY] for data in recorded if ERROR_KEY in data)
    if texts:
        print("\n".join(texts), file=sys.stderr, flush=True)
    elif kind.__name__ != "SignalException":
        sys.__excepthook__(kind, error, trace)
