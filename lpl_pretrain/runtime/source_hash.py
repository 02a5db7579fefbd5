"""Hash of the source code, to detect that it differs between nodes or changed before a requeue."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lpl_pretrain", "launch")


def source_hash() -> str:
    """sha256 over the names and bytes of all Python files of PACKAGES, as hexadecimal digits."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
