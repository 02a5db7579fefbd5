"""`lpl-pretrain` with writes that are not atomic, for the campaign to detect.

python -m tests.chaos.broken ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpl_pretrain.runtime import atomic


@contextmanager
def written_in_place(path: Path) -> Iterator[Path]:
    """Replacement for `atomic_write` that may leave a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path


atomic.atomic_write = written_in_place

from lpl_pretrain.encoding import publish  # noqa: E402


def created_in_place(path: Path, chunks: list[bytes]) -> bool:
    """Replacement for `publish_new` that may leave a partial file."""
    path.write_bytes(b"".join(chunks))
    return True


publish.publish_new = created_in_place

from lpl_pretrain.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
