"""Writing under a temporary name, then renaming: a file that exists is whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpl_pretrain.runtime.preempt import leaves_traces


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends, and nothing is left when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves_traces()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # unique on a file system that several nodes share
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
