"""Bytes alive, known by hand."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lpl_pretrain.planning.live_bytes import LiveBytes

KIB = 1024


def kib(device="cpu", count=1):
    return torch.zeros(256 * count, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_and_what_is_left(device):
    with LiveBytes() as live:
        a = kib(device)
        b = kib(device, 2)
        del b
        c = kib(device)
    assert (live.peak, live.now) == (3 * KIB, 2 * KIB)
    del a
    assert live.now == KIB
    del c
    assert live.now == 0


def test_views_and_work_in_place_are_free():
    with LiveBytes() as live:
        a = kib(count=4)
        b = a.view(2, -1)[1:].t()
        b.add_(1)
        a.mul_(2)
    assert live.peak == 4 * KIB


def test_what_was_there_before_does_not_count():
    before = kib(count=8)
    with LiveBytes() as live:
        before.add_(1)
        before.view(-1)
        result = before[:256] + 1
    assert live.peak == live.now == result.untyped_storage().nbytes()


def chain(x, layers=6):
    for _ in range(layers):
        x = x.sin()
    return x


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_frees_as_it_goes_and_checkpointing_lowers_the_peak(device):
    x, g = kib(device, 16).requires_grad_(), kib(device, 16)
    with LiveBytes() as plain:
        torch.autograd.grad(chain(x, 12), x, g)
    with LiveBytes() as checkpointed:
        y = checkpoint(chain, checkpoint(chain, x, use_reentrant=False), use_reentrant=False)
        torch.autograd.grad(y, x, g)
    # twelve results, the gradient and one factor; two of the checkpoints, six recomputed results,
    # and the same
    assert (plain.peak, checkpointed.peak) == (14 * 16 * KIB, 9 * 16 * KIB)


def test_has_teeth_a_result_that_is_kept_shows():
    with LiveBytes() as live:
        kept = [kib() for _ in range(5)]
    assert live.peak == len(kept) * KIB
