"""`lpl-pretrain audit RUN`: checks by logged samples that every update used the right ones."""

from __future__ import annotations

from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import DataError


def run(run: str) -> None:
    """Prints a summary.  Raises DataError that lists the problems."""
    from lpl_pretrain.data.ledger import audit  # numpy and torch: not for --help
    from lpl_pretrain.data.order import SampleOrder

    run_dir = RunDir(expand(run))
    config = load_run_config(run_dir)
    global_batch_size = config.batch.global_batch_size
    data = config.data
    order = SampleOrder(
        read_data(data.folder),
        config.seed,
        global_batch_size,
        lanes=data.lanes,
        shuffle_block_samples=data.shuffle_block_samples,
    )
    result = audit(run_dir, order, global_batch_size)
    if result.problems:
        raise DataError("\n".join([f"{run}: {result.steps} updates were logged", *result.problems]))
    print(
        f"{result.steps:,} updates of {global_batch_size} samples, {result.starts} starts, "
        f"{result.repeated_updates} updates repeated after one"
    )
    if result.rollbacks:
        print(
            f"{result.rollbacks} of the starts are rollbacks after a spike; the samples of "
            f"{result.jump_updates:,} updates were jumped over"
        )
    print("no sample of an update was missed, none was read twice")
    print(
        f"each sample of the data was read {result.min_reads} to {result.max_reads} times; "
        f"{result.substitutes} reads were of substitutes for unreadable samples"
    )
