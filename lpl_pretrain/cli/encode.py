"""`lpl-pretrain encode CONFIG`: pictures to a folder of latents, and a summary in one line;
`--verify` re-reads such a folder.
"""

from __future__ import annotations

import time
from pathlib import Path

from lpl_pretrain.config.dataset import INDEX_NAME
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.runtime.world import World


def run(config: EncodeConfig) -> None:
    from lpl_pretrain.encoding.encode import encode  # torch: not for --help
    from lpl_pretrain.runtime.log import set_up_logging

    world = World.from_environment()
    set_up_logging(world.rank)
    was_finished = (Path(config.output) / INDEX_NAME).is_file()
    started = time.monotonic()
    index = encode(config, world=world)
    elapsed_s = time.monotonic() - started
    if index is None:
        print(
            f"{config.output}: the parts of process {world.rank} of {world.world_size} are done; "
            "the last process writes the index"
        )
        return
    size_mib = sum(shard.bytes for shard in index.shards) / 2**20
    how = (
        "encoded before from the same inputs, left alone"
        if was_finished
        else f"{index.samples / elapsed_s:.1f} pictures/s"
    )
    skipped = f", {index.skipped} skipped" if index.skipped else ""
    print(
        f"{config.output}: {index.samples} samples{skipped}, {len(index.classes)} classes, "
        f"{len(index.shards)} shards, {size_mib:.1f} MiB; {how}"
    )


def verify(config: EncodeConfig, pictures: int) -> bool:
    """Prints a table; False when something is wrong."""
    from lpl_pretrain.encoding.verify import verify as check
    from lpl_pretrain.runtime.log import set_up_logging

    set_up_logging(0)
    report = check(config, pictures)
    print(report.table())
    return report.is_sound
