"""The order of samples: a pure function of (seed, samples per epoch, count), over every layout that asks for it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lpl_pretrain.data.order import SampleOrder

SAMPLES = 23


def test_every_epoch_serves_every_sample_once_in_another_order() -> None:
    epochs = SampleOrder(SAMPLES, seed=1).dataset_index(np.arange(5 * SAMPLES)).reshape(5, SAMPLES)
    assert (np.sort(epochs, axis=1) == np.arange(SAMPLES)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


def test_same_samples_for_any_layout() -> None:
    """Ranks, micro-batches and resume points cut the counts differently; what they get together is the same."""
    wanted = SampleOrder(SAMPLES, seed=7).dataset_index(np.arange(480))
    layouts = [
        layout
        for layout in itertools.product([8, 24, 48], [1, 2, 3, 4, 6, 8], [1, 2, 4], [0, 96, 240])
        if layout[0] % (layout[1] * layout[2]) == 0
    ]  # batch, ranks, accumulation, resumed at
    assert len(layouts) > 100
    for batch, ranks, accumulation, resumed in layouts:
        share = batch // ranks // accumulation
        orders = [SampleOrder(SAMPLES, seed=7) for _ in range(ranks)]
        got = np.full(480, -1)
        for start in range(resumed, 480, batch):
            for rank, micro in itertools.product(reversed(range(ranks)), range(accumulation)):
                first = start + (rank * accumulation + micro) * share
                counts = np.arange(first, first + share)
                got[counts] = orders[rank].dataset_index(counts)
        assert np.array_equal(got[resumed:], wanted[resumed:]), (batch, ranks, accumulation, resumed)


def test_does_not_depend_on_what_was_asked_before() -> None:
    order, wanted = SampleOrder(SAMPLES, seed=3), SampleOrder(SAMPLES, seed=3).dataset_index(np.arange(230))
    counts = np.random.default_rng(0).permutation(230)
    assert np.array_equal(order.dataset_index(counts), wanted[counts])
    assert np.array_equal(order.dataset_index(counts.reshape(10, 23)), wanted[counts].reshape(10, 23))


def test_batch_larger_than_many_epochs() -> None:
    assert SampleOrder(1, seed=0).dataset_index([0, 5, 1000]).tolist() == [0, 0, 0]
    assert np.bincount(SampleOrder(3, seed=0).dataset_index(np.arange(300))).tolist() == [100, 100, 100]


def test_seeds_differ() -> None:
    zero, one = (SampleOrder(SAMPLES, seed).dataset_index(range(SAMPLES)) for seed in (0, 1))
    assert zero.tolist() != one.tolist()


def test_the_order_never_changes() -> None:
    """A run that is resumed by a later version must go on in the same order."""
    assert SampleOrder(8, seed=0).dataset_index(range(16)).tolist() == [4, 7, 5, 0, 3, 2, 6, 1, 2, 4, 6, 1, 5, 7, 0, 3]


def test_negative_counts_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        SampleOrder(8, seed=0).dataset_index([-1])
