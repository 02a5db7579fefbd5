"""`lpl-pretrain audit RUN`: was every update made of the samples that it should have been made of,
whatever happened to the run?
"""

from __future__ import annotations

from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import DataError


def run(run: str) -> None:
    """Raises DataError that lists what is wrong."""
    from lpl_pretrain.data.ledger import audit  # numpy and torch: not for --help
    from lpl_pretrain.data.order import SampleOrder

    run_dir = RunDir(expand(run))
    config = load_run_config(run_dir)
    size, data = config.batch.global_batch_size, config.data
    order = SampleOrder(
        read_data(data.folder),
        config.seed,
        size,
        lanes=data.lanes,
        block_samples=data.block_samples,
    )
    found = audit(run_dir, order, size)
    if found.problems:
        raise DataError("\n".join([f"{run}: {found.steps} updates were logged", *found.problems]))
    print(
        f"{found.steps:,} updates of {size} samples, {found.starts} starts, {found.made_again} "
        "updates made again after one"
    )
    if found.rollbacks:
        print(
            f"{found.rollbacks} of the starts are rollbacks after a spike; the samples of "
            f"{found.jump_updates:,} updates were jumped over"
        )
    print("no sample of an update was missed, none was seen twice")
    print(
        f"a sample of the data was seen {found.least} to {found.most} times; {found.stand_ins} "
        "stood in for damaged ones"
    )
