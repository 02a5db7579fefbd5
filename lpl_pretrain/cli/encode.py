"""`lpl-pretrain encode CONFIG`: pictures to a folder of latents, and a summary in one line."""

from __future__ import annotations

import time
from pathlib import Path

from lpl_pretrain.config.dataset import INDEX_NAME
from lpl_pretrain.config.schema import EncodeConfig


def run(config: EncodeConfig) -> None:
    from lpl_pretrain.data.encode import encode  # torch: not for --help

    was_finished = (Path(config.output) / INDEX_NAME).is_file()
    started = time.monotonic()
    index = encode(config)
    elapsed_s = time.monotonic() - started
    size_mib = sum(shard.bytes for shard in index.shards) / 2**20
    how = "encoded before from the same inputs, left alone" if was_finished else f"{index.samples / elapsed_s:.1f} pictures/s"
    print(
        f"{config.output}: {index.samples} samples, {len(index.classes)} classes, "
        f"{len(index.shards)} shards, {size_mib:.1f} MiB; {how}"
    )
