"""Upgrades a finished folder of format 2 to the current format, which has digests of the index and
the null texts.

Runs on the folder can go on: the fingerprint that keys the order of samples stays the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lpl_pretrain.config.dataset import (
    FORMAT_VERSION,
    INDEX_NAME,
    DatasetIndex,
    FileEntry,
    index_bytes,
    read_index,
)
from lpl_pretrain.config.paths import is_url
from lpl_pretrain.data.format import null_text_name
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.encoding.publish import publish
from lpl_pretrain.encoding.shard_checks import check_shards
from lpl_pretrain.errors import DataError


def seal(folder: str) -> DatasetIndex:
    """Compares the whole index with the shards, statistics included, then adds the digests.

    Null texts are only checked for their shape and finite numbers: only `encode --verify` can
    compare them, with the encoder.  Raises DataError if the index and the shards differ.
    """
    if is_url(folder):
        raise DataError(
            f"{folder}: only a local folder can be sealed: seal it on its own machine, and copy "
            "its index.json"
        )
    index = read_index(folder)
    path = Path(folder)
    if index.format_version >= FORMAT_VERSION:
        return index
    problems = [problem for check in check_shards(path, index) for problem in check.problems]
    if problems:
        raise DataError(
            f"{folder}: not sealed, its index and its shards differ: "
            + "".join(f"\n  {line}" for line in problems[:10])
        )
    read_null_text(folder, index, list(index.text))
    null_text = {name: (path / null_text_name(name)).read_bytes() for name in index.text}
    sealed = index.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "shards_fingerprint": index.fingerprint,
            "null_text": {
                name: FileEntry(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
                for name, raw in null_text.items()
            },
        }
    )
    publish(path / INDEX_NAME, [index_bytes(sealed)])
    return read_index(folder)
