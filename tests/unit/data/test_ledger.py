"""What every update was made of, over restarts, lost updates and other numbers of ranks; and that the audit finds what is wrong."""

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
"""(first step, last step, ranks) of every start: updates 5 and 7 are made again."""


@pytest.fixture
def order():
    folders = simulated_folders({"a": 1.0}, {"a": simulated_index("a", {(16, 16): [9, 15]})})
    return SampleOrder(folders, 7, SIZE, lanes=2, block_samples=4)


def batch(order, counts):
    found, nothing = order.locate(counts), torch.zeros(0)
    places = list(zip(found.folder.tolist(), found.shard.tolist(), found.row.tolist(), strict=True))
    return LatentBatch(nothing, nothing, torch.tensor(counts), nothing, places=places)


def train(run_dir, order, history=HISTORY, take=lambda step, rank, counts: counts):
    for number, (first, last, ranks) in enumerate(history):
        for rank in range(ranks):
            ledger = Ledger(run_dir.ledger(rank), f"start {number}", first)
            for step in range(first + 1, last + 1):
                counts = list(range((step - 1) * SIZE + rank, step * SIZE, ranks))
                counts = take(step, rank, counts)
                ledger.note(step, [batch(order, counts[:1]), batch(order, counts[1:])])
            ledger.close()


def test_restarts_on_other_layouts_miss_and_repeat_nothing(tmp_path, order):
    run_dir = RunDir(tmp_path)
    train(run_dir, order)
    found = audit(run_dir, order, SIZE)
    assert found.problems == []
    assert (found.steps, found.starts, found.made_again, found.stand_ins) == (9, 3, 2, 0)
    assert (found.least, found.most) == (9 * SIZE // SAMPLES, 9 * SIZE // SAMPLES), "three epochs"


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda step, rank, counts: counts[1:] if (step, rank) == (3, 1) else counts, "update 3: 1 samples missed, such as 17"),
        (lambda step, rank, counts: [*counts, counts[0]] if (step, rank) == (2, 0) else counts, "update 2: 1 samples seen twice"),
        (lambda step, rank, counts: [0, *counts[1:]] if (step, rank) == (4, 0) else counts, "update 4: 1 samples of another"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, order, take, message):
    train(RunDir(tmp_path), order, take=take)
    assert re.search(message, "\n".join(audit(RunDir(tmp_path), order, SIZE).problems))


def test_an_update_that_is_missing_is_found(tmp_path, order):
    """A run that took up a step too late."""
    train(RunDir(tmp_path), order, history=[(0, 3, 2), (4, 6, 2)])
    assert audit(RunDir(tmp_path), order, SIZE).problems == [f"update 4: {SIZE} samples missed, such as 24"]


def test_a_sample_in_the_place_of_another_is_counted(tmp_path, order):
    train(RunDir(tmp_path), order)
    file = RunDir(tmp_path).ledger(0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["samples"][0][2:] = [0, 8] if lines[1]["samples"][0][2:] != [0, 8] else [0, 7]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert audit(RunDir(tmp_path), order, SIZE).stand_ins == 1


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path, order):
    train(RunDir(tmp_path), order, history=[(0, 3, 1)])
    file = RunDir(tmp_path).ledger(0)
    file.write_bytes(file.read_bytes()[:-30])
    train(RunDir(tmp_path), order, history=[(2, 2, 1)])
    with file.open("a") as more:
        more.write('{"step": 3, "sam')
    ledger = Ledger(file, "last", 2)
    ledger.note(3, [batch(order, list(range(16, 24)))])
    ledger.close()
    found = audit(RunDir(tmp_path), order, SIZE)
    assert found.problems == [] and found.steps == 3


def test_without_a_ledger(tmp_path, order):
    with pytest.raises(DataError, match="train with log.samples=true"):
        audit(RunDir(tmp_path), order, SIZE)
