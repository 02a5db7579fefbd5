"""Which checkpoints must not be removed: those that are being scored, and the best ones.

An evaluator protects a checkpoint by a lease, evaluations/step_*/<protocol>.lease, which it holds
while it generates from that step (evaluation/evaluator.py); a queued evaluation job holds
<protocol>.queued.lease (launch/watch.py).  A stale lease protects nothing.  A best-checkpoint file,
evaluations/best_<protocol>.json, protects the step that it names for good.
"""

from __future__ import annotations

from lpl_pretrain.config.best import best_steps
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.runtime.lease import is_stale
from lpl_pretrain.runtime.log import log


def protected_steps(run_dir: RunDir) -> set[int]:
    """Steps whose checkpoints an evaluation needs, now or later."""
    being_scored = {step for step, lease in run_dir.evaluation_leases() if not is_stale(lease)}
    return being_scored | best_steps(run_dir.best_files(), log.warning)
