"""A short campaign of tools/chaos.py with a fixed seed: all series but the one on SLURM."""

from __future__ import annotations

import pytest

from tools.faults import plan
from tools.faults.attempt import AttemptResult, error_problems
from tools.faults.campaign import Campaign
from tools.faults.layer import Hit
from tools.faults.plan import FileFault

FAULTS = {
    "encode": 20,
    "train_local": 14,
    "train_spikes": 4,
    "train_fsdp2": 12,
    "train_zero2": 10,
    "train_zero3": 10,
    "evaluate": 12,
}
"""Smallest number of faults in each series."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("chaos"), seed=0)


@pytest.mark.parametrize("name", FAULTS)
def test_a_disturbed_job_ends_like_an_undisturbed_one(campaign: Campaign, name: str) -> None:
    tally = campaign.run(name, lambda tally: tally.faults.total() >= FAULTS[name])
    assert not tally.violations, "\n".join(map(str, tally.violations))
    assert tally.faults.total() >= FAULTS[name] and tally.recovered == tally.iterations > 0


EMPTY = FileFault("SIGKILL", 0, "write", "kill", 1, "index.json")
"""SIGKILL at the first write to index.json, when the file exists and is empty."""


def test_has_teeth_writes_in_place(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign reports writes that are not atomic (tests/chaos/broken.py)."""
    plans = iter([[EMPTY]])
    monkeypatch.setattr("tools.faults.campaign.draw", lambda *args, **kwargs: next(plans, []))
    tally = campaign.running("tests.chaos.broken").run("encode", lambda tally: False, only=1000)
    assert tally.faults["SIGKILL"] == 1 and tally.recovered == 0
    assert (
        "was given up" in str(tally.violations[-1]) and "--only 1000" in tally.violations[-1].replay
    )


CLEAR = "StorageError: /root/run/metrics.jsonl: No space left on device: look at the file system"
UNCLEAR = (
    "Traceback (most recent call last):\n  File ...\nOSError: [Errno 28] No space left on "
    f"device\n{CLEAR}"
)


def ended(status: int, text: str, action: str = "28") -> AttemptResult:
    hit = Hit(1, 100, 0, "write", action, "/root/run/metrics.jsonl")
    return AttemptResult([status], {"rank_0": text}, [hit], [], 1.0)


@pytest.mark.parametrize(
    ("result", "wrong"),
    [
        (ended(1, CLEAR), None),
        (ended(0, ""), None),
        (ended(1, "Killed"), "no clear error"),
        (ended(1, UNCLEAR), "traceback"),
        (ended(1, CLEAR.replace("/root/run/metrics.jsonl", "a file")), "no clear error"),
        (ended(1, CLEAR, action="5"), "no clear error"),
        (ended(2, CLEAR), "exit status 2"),
    ],
    ids=[
        "clear",
        "survived",
        "no error",
        "traceback",
        "no path",
        "another reason",
        "bad input",
    ],
)
def test_what_counts_as_a_clear_error(result: AttemptResult, wrong: str | None) -> None:
    problems = error_problems(result, "/root")
    assert bool(problems) == (wrong is not None) and (wrong or "") in " ".join(problems)


def test_plans_are_functions_of_the_seed() -> None:
    trace = [
        (rank, op, f"/root/a_{n:05d}.json")
        for rank in (0, 1)
        for op in plan.WRITES
        for n in range(9)
    ]
    drawn = [
        plan.draw(plan.generator(seed, "x", 3, 4), trace, 2, leased=True) for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    many = [
        fault
        for n in range(300)
        for fault in plan.draw(plan.generator(0, "x", n, 0), trace, 2, leased=True)
    ]
    kinds = {fault.kind for fault in many}
    assert {
        "SIGKILL",
        "SIGSTOP",
        "SIGTERM",
        "EIO",
        "ENOSPC",
        "EDQUOT",
        "EINTR",
        "disk full",
        "lease lost",
    } <= kinds
