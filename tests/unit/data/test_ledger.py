"""Samples of every update over restarts, lost updates and other numbers of ranks; the audit detects
wrong ones.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.batch import LatentBatch
from lpl_pretrain.data.ledger import Ledger, audit
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.errors import DataError
from tests.support.indexes import simulated_folders, simulated_index

SIZE, SAMPLES = 8, 24
HISTORY = [(0, 5, 2), (4, 7, 4), (6, 9, 1)]
"""(first step, last step, ranks) of every start: updates 5 and 7 are repeated."""


@pytest.fixture
def order():
    folders = simulated_folders({"a": 1.0}, {"a": simulated_index("a", {(16, 16): [9, 15]})})
    return SampleOrder(folders, 7, SIZE, lanes=2, shuffle_block_samples=4)


def batch(order, indices):
    empty = torch.zeros(0)
    locations = order.locate(indices).tuples()
    return LatentBatch(empty, empty, torch.tensor(indices), empty, locations=locations)


def train(run_dir, order, history=HISTORY, take=lambda step, rank, indices: indices):
    for number, (first, last, ranks) in enumerate(history):
        for rank in range(ranks):
            ledger = Ledger(run_dir.ledger(rank), f"start {number}", first)
            for step in range(first + 1, last + 1):
                indices = list(range((step - 1) * SIZE + rank, step * SIZE, ranks))
                indices = take(step, rank, indices)
                ledger.write(step, [batch(order, indices[:1]), batch(order, indices[1:])])
            ledger.close()


def test_restarts_on_other_layouts_miss_and_repeat_nothing(tmp_path, order):
    run_dir = RunDir(tmp_path)
    train(run_dir, order)
    result = audit(run_dir, order, SIZE)
    assert result.problems == []
    counts = (result.steps, result.starts, result.repeated_updates, result.substitutes)
    assert counts == (9, 3, 2, 0)
    assert (result.min_reads, result.max_reads) == (9 * SIZE // SAMPLES, 9 * SIZE // SAMPLES), (
        "three epochs"
    )


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (
            lambda step, rank, indices: indices[1:] if (step, rank) == (3, 1) else indices,
            "update 3: 1 samples missed, such as 17",
        ),
        (
            lambda step, rank, indices: (
                [*indices, indices[0]] if (step, rank) == (2, 0) else indices
            ),
            "update 2: 1 samples read twice",
        ),
        (
            lambda step, rank, indices: [0, *indices[1:]] if (step, rank) == (4, 0) else indices,
            "update 4: 1 samples of another",
        ),
    ],
)
def test_wrong_samples_are_detected(tmp_path, order, take, message):
    train(RunDir(tmp_path), order, take=take)
    assert re.search(message, "\n".join(audit(RunDir(tmp_path), order, SIZE).problems))


def test_a_missing_update_is_detected(tmp_path, order):
    """A run that resumed one step too late."""
    train(RunDir(tmp_path), order, history=[(0, 3, 2), (4, 6, 2)])
    assert audit(RunDir(tmp_path), order, SIZE).problems == [
        f"update 4: {SIZE} samples missed, such as 24"
    ]


ROLLBACK = [
    {"first": 0, "last": 6},
    {"first": 4, "last": 7, "jump": 3, "spike": (6, 2)},  # to position 7, behind 5 and 6
    {"first": 6, "last": 8, "jump": 3},  # killed, and resumed from a checkpoint of step 6
    {"first": 0, "last": 2},  # from nothing: all checkpoints were removed
    {"first": 0, "last": 3, "jump": 3, "spike": (2, 2)},
]


def train_with_jumps(run_dir, order, history, ranks=2):
    for number, start in enumerate(history):
        jump = start.get("jump", 0)
        for rank in range(ranks):
            ledger = Ledger(
                run_dir.ledger(rank), f"start {number}", start["first"], jump, start.get("spike")
            )
            for step in range(start["first"] + 1, start["last"] + 1):
                position = step - 1 + start.get("taken", jump)
                indices = list(range(position * SIZE + rank, (position + 1) * SIZE, ranks))
                ledger.write(step, [batch(order, indices)])
            ledger.close()


@pytest.mark.parametrize(
    ("starts", "steps", "again"),
    [(2, 7, 2), (3, 8, 3), (5, 3, 6 + 3 + 2 + 2)],
    ids=["rollback", "resume", "a second one"],
)
def test_a_rollback_jumps_over_samples(tmp_path, order, starts, steps, again):
    train_with_jumps(RunDir(tmp_path), order, ROLLBACK[:starts])
    result = audit(RunDir(tmp_path), order, SIZE)
    assert result.problems == []
    assert (result.steps, result.starts, result.jump_updates) == (steps, starts, 3)
    assert result.rollbacks == (2 if starts == 5 else 1)
    assert result.repeated_updates == again


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, {"jump": 2}, "start at step 4: 2 updates jumped over, wanted 3"),
        (1, {"jump": 4}, "start at step 4: 4 updates jumped over, wanted 3"),
        (1, {"spike": (5, 3)}, "rollback to step 4: of update 5, but 6 was the last"),
        (1, {"spike": None}, "start at step 4: 3 updates jumped over, wanted 0"),
        (1, {"taken": 0}, "update 5: 8 samples missed"),
        (2, {"jump": 0}, "start at step 6: 0 updates jumped over, wanted 3"),
        (2, {"taken": 2}, "update 7: 8 samples of another update"),
    ],
    ids=str,
)
def test_a_wrong_jump_is_detected(tmp_path, order, number, change, message):
    """The number is wrong, or it is right and the samples are others."""
    history = [dict(start) for start in ROLLBACK[:3]]
    history[number] |= change
    train_with_jumps(RunDir(tmp_path), order, history)
    assert message in "\n".join(audit(RunDir(tmp_path), order, SIZE).problems)


def test_without_a_jump_the_file_has_the_older_format(tmp_path):
    Ledger(RunDir(tmp_path).ledger(0), "a", 3).close()
    assert RunDir(tmp_path).ledger(0).read_text() == '{"start": "a", "step": 3}\n'


def test_substitutes_are_counted(tmp_path, order):
    train(RunDir(tmp_path), order)
    file = RunDir(tmp_path).ledger(0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["samples"][0][2:] = [0, 8] if lines[1]["samples"][0][2:] != [0, 8] else [0, 7]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert audit(RunDir(tmp_path), order, SIZE).substitutes == 1


def test_a_torn_line_affects_no_other(tmp_path, order):
    train(RunDir(tmp_path), order, history=[(0, 3, 1)])
    file = RunDir(tmp_path).ledger(0)
    file.write_bytes(file.read_bytes()[:-30])
    train(RunDir(tmp_path), order, history=[(2, 2, 1)])
    with file.open("a") as more:
        more.write('{"step": 3, "sam')
    ledger = Ledger(file, "last", 2)
    ledger.write(3, [batch(order, list(range(16, 24)))])
    ledger.close()
    result = audit(RunDir(tmp_path), order, SIZE)
    assert result.problems == [] and result.steps == 3


def test_late_lines_of_a_suspended_rank_belong_to_its_own_start(tmp_path, order):
    run_dir = RunDir(tmp_path)
    suspended = [Ledger(run_dir.ledger(rank), "suspended", 0) for rank in range(2)]
    train(run_dir, order, history=[(0, 3, 2)])
    for rank, ledger in enumerate(suspended):
        ledger.write(1, [batch(order, list(range(rank, SIZE, 2)))])
        ledger.close()
    result = audit(run_dir, order, SIZE)
    assert result.problems == [] and (result.starts, result.repeated_updates) == (2, 1)


def test_lines_of_older_versions_do_not_name_their_start(tmp_path, order):
    train(RunDir(tmp_path), order)
    for file in tmp_path.glob("logs/*"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if "samples" in line:
                del line["start"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = audit(RunDir(tmp_path), order, SIZE)
    assert result.problems == [] and (result.starts, result.repeated_updates) == (3, 2)


def test_without_a_ledger(tmp_path, order):
    with pytest.raises(DataError, match="train with log.sample_indices=true"):
        audit(RunDir(tmp_path), order, SIZE)
