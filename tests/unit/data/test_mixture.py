"""Fractions of folders and buckets: exact, in closed form, the same from any starting index."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from lpl_pretrain.config.dataset import MIX_CYCLE_SAMPLES
from lpl_pretrain.data.mixture import BucketSchedule, Mixture, quotas


def fractions(*weights: float) -> list[Fraction]:
    return [Fraction(repr(weight)) for weight in weights]


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (0.7, 0.2, 0.1), (1, 4095), (0.3333, 0.3333, 0.3334), (5, 3, 2, 2, 1)]
)
def test_every_cycle_has_the_exact_fractions(weights: tuple[float, ...]) -> None:
    quota = quotas(fractions(*weights))
    assert quota.sum() == MIX_CYCLE_SAMPLES
    assert np.abs(quota - np.array(weights) / sum(weights) * MIX_CYCLE_SAMPLES).max() < 1
    streams, inside = Mixture(fractions(*weights), 0, "mix").assign(
        np.arange(3 * MIX_CYCLE_SAMPLES)
    )
    for stream, size in enumerate(quota):
        mine = streams == stream
        assert mine.reshape(3, -1).sum(axis=1).tolist() == [size] * 3
        assert inside[mine].tolist() == list(
            range(3 * size)
        )  # each stream is read in its own order, without a gap


def test_folders_are_interleaved() -> None:
    streams, _ = Mixture(fractions(0.5, 0.5), 0, "mix").assign(np.arange(MIX_CYCLE_SAMPLES))
    windows = (streams == 0).reshape(-1, 64).mean(axis=1)
    assert windows.min() > 0.2 and windows.max() < 0.8 and len(set(windows.tolist())) > 5


def test_a_mixture_at_any_index() -> None:
    wanted = Mixture(fractions(3, 1), 5, "mix").assign(np.arange(20_000))
    indices = np.random.default_rng(0).permutation(20_000)
    got = Mixture(fractions(3, 1), 5, "mix").assign(indices)
    assert all(np.array_equal(g, w[indices]) for g, w in zip(got, wanted, strict=True))


def bucket_schedule(samples: list[int], batch: int, seed: int = 0) -> BucketSchedule:
    return BucketSchedule([Fraction(n) for n in samples], batch, seed, "name")


@pytest.mark.parametrize(
    "samples", [[100, 50], [7, 1000, 3], [1, 1, 1], [64, 64], [999, 998, 997, 5]], ids=str
)
@pytest.mark.parametrize("batch", [1, 8, 96, 512])
def test_every_bucket_is_read_in_proportion_and_without_a_gap(
    samples: list[int], batch: int
) -> None:
    """Bucket b has had floor(e * samples_b / batch) batches after e epochs: all of its samples but
    for less than a batch.
    """
    epochs = 6 * batch
    steps = sum(epochs * n // batch for n in samples)
    if steps > 40_000:
        epochs, steps = 6, sum(6 * n // batch for n in samples)
    schedule = bucket_schedule(samples, batch)
    served = [schedule.batch(step) for step in range(steps)]
    for bucket, n in enumerate(samples):
        batches = [number for found, number in served if found == bucket]
        assert batches == list(range(epochs * n // batch))


def test_one_bucket_per_global_batch() -> None:
    buckets, inside = bucket_schedule([300, 200, 100], 48).assign(np.arange(48 * 40))
    assert (buckets.reshape(40, 48) == buckets.reshape(40, 48)[:, :1]).all()
    for bucket in range(3):
        mine = inside[buckets == bucket]
        assert mine.tolist() == list(range(len(mine)))


def test_buckets_at_any_index() -> None:
    wanted = bucket_schedule([300, 200, 100], 16).assign(np.arange(16 * 500))
    for first, size in itertools.product((0, 16 * 77, 16 * 301), (1, 2, 4, 16)):
        schedule = bucket_schedule([300, 200, 100], 16)
        pieces = [schedule.assign(np.arange(n, n + size)) for n in range(first, 16 * 320, size)]
        for i in (0, 1):
            assert np.array_equal(
                np.concatenate([piece[i] for piece in pieces]), wanted[i][first : 16 * 320]
            )
    buckets, _ = bucket_schedule([10**7, 10**6], 256).assign(np.arange(10**13, 10**13 + 10))
    assert set(buckets.tolist()) <= {0, 1}


def test_buckets_come_in_another_order_each_epoch() -> None:
    buckets, _ = bucket_schedule([800, 800], 8).assign(np.arange(3200))
    first, second = buckets[:1600:8], buckets[1600::8]
    assert first.tolist() != second.tolist() and 5 < (np.diff(first) != 0).sum() < 195


def test_a_single_bucket_ignores_the_batch_size() -> None:
    for batch in (1, 7, 64):
        assert bucket_schedule([10], batch).assign(np.arange(30))[1].tolist() == list(range(30))


def test_the_schedule_never_changes() -> None:
    streams, _ = Mixture(fractions(0.5, 0.3, 0.2), 0, "mix").assign(np.arange(16))
    assert streams.tolist() == [0, 2, 0, 2, 2, 0, 0, 1, 2, 0, 2, 0, 2, 0, 0, 0]
    buckets, _ = bucket_schedule([30, 20, 10], 4).assign(np.arange(0, 64, 4))
    assert buckets.tolist() == [0, 2, 0, 0, 1, 1, 0, 0, 0, 1, 2, 1, 0, 1, 0, 1]
