"""Batches of features on disk: shared out, taken up again, the same scores for any number of
processes.
"""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation.feature_store import FeatureStore

ROWS = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))


def filled(folder, batch_size=4, world_size=1, rows=ROWS):
    store = FeatureStore(folder, len(rows), batch_size)
    for rank in reversed(range(world_size)):
        for batch in store.missing(rank, world_size):
            store.put(
                batch,
                {
                    "x": rows[batch.start : batch.stop],
                    **({"first": rows[:2].clone()} if batch.start == 0 else {}),
                },
            )
    return store


def test_rows_come_back_in_order(tmp_path):
    store = filled(tmp_path, world_size=3)
    assert torch.equal(store.read_all("x"), ROWS) and torch.equal(
        store.read_first("x", 6), ROWS[:6]
    )
    assert torch.equal(store.read_all("first"), ROWS[:2])
    assert store.batches[-1] == range(20, 23) and not store.missing(0, 1)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_statistics_do_not_depend_on_the_number_of_processes(tmp_path, world_size):
    one, many = (
        filled(tmp_path / "one").statistics("x"),
        filled(tmp_path / "many", world_size=world_size).statistics("x"),
    )
    assert many.count == 23, "an uneven last batch counts once"
    assert torch.equal(one.mean, many.mean) and torch.equal(one.scatter, many.scatter)


def test_has_teeth_a_batch_counted_twice(tmp_path):
    store = filled(tmp_path)
    wrong = FeatureStore(tmp_path, 23, 4)
    total = store.statistics("x")
    for rows in wrong.rows("x", wrong.batches[-1:]):
        total.update(rows)
    assert not torch.allclose(total.mean, ROWS.double().mean(dim=0), rtol=1e-10)


def test_what_is_there_is_not_made_again(tmp_path):
    store = FeatureStore(tmp_path, 10, 4)
    store.put(range(4, 8), {"x": ROWS[4:8]})
    assert store.missing(0, 1) == [range(4), range(8, 10)] and store.missing(1, 2) == []
    (tmp_path / ".pictures_00000000.safetensors.abcd.tmp").write_bytes(
        b"half a batch"
    )  # of a process that was killed
    assert store.missing(0, 2) == [range(4), range(8, 10)]


def test_statistics_of_half_of_the_images(tmp_path):
    assert filled(tmp_path).statistics("x", fraction=0.5).count == 12


def test_features_that_are_not_finite_are_named(tmp_path):
    rows = ROWS.clone()
    rows[9, 2] = float("nan")
    with pytest.raises(DataError, match=r"x features of images \[9\] are not finite"):
        filled(tmp_path, rows=rows)
