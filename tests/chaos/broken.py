"""The commands with a recovery that is broken on purpose, for the campaign to find: python -m
tests.chaos.broken ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpl_pretrain.runtime import atomic


@contextmanager
def written_in_place(path: Path) -> Iterator[Path]:
    """As `atomic_write`, but a file that exists may be half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path


atomic.atomic_write = written_in_place

from lpl_pretrain.encoding import writer  # noqa: E402


def created_in_place(path: Path, pieces: list[bytes]) -> bool:
    """As `publish_new`, but a file that exists may be half of one."""
    path.write_bytes(b"".join(pieces))
    return True


writer.publish_new = created_in_place

from lpl_pretrain.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
