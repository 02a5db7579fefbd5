"""What a step trains on is a function of (seed, step); who takes it never changes what is taken."""

import math

import pytest
import torch

from lpl_pretrain.config.schema import OptimizerConfig, ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.perceptual.gate import gate_share
from lpl_pretrain.trainer.deal import Choice, Dealer
from lpl_pretrain.trainer.lr import learning_rate


def dealer(size=48, kind=ScheduleKind.RECTIFIED_FLOW, distribution="logit_normal", seed=3):
    return Dealer(seed, size, TimestepConfig(distribution=distribution), make_schedule(kind))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 6, 8, 12])
def test_the_global_batch_does_not_depend_on_the_slots(slots):
    one = dealer().deal(7, slots=1)[0]
    hands = dealer().deal(7, slots=slots)
    assert all(len(hand.sample_indices) == 48 // slots for hand in hands)
    dealt = {i: t.item() for hand in hands for i, t in zip(hand.sample_indices, hand.t)}
    assert dealt == {i: t.item() for i, t in zip(one.sample_indices, one.t)}
    assert sorted(dealt) == list(range(7 * 48, 8 * 48))


@pytest.mark.parametrize("kind", list(ScheduleKind))
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("threshold", [0.2, 3**-0.5, 1.0, 3.0])
def test_gated_samples_lie_in_the_prefix_of_every_hand(kind, distribution, threshold):
    d = dealer(kind=kind, distribution=distribution)
    share = gate_share(threshold, d.schedule, d.timesteps)
    for slots in (1, 2, 3, 8):
        prefix = Choice.of(48, share, 1.0).prefix(slots)
        assert prefix <= math.ceil(48 * share / slots) + 1
        counts = []
        for step in range(20):
            for hand in d.deal(step, slots):
                gated = d.schedule.noise_level(hand.t) <= threshold
                assert not gated[prefix:].any()
                counts.append(int(gated.sum()))
        assert max(counts) - min(counts) <= 2  # one for the stratum that straddles the gate, one for the dealing


def test_has_teeth_without_sorting():
    """Dealt in the order of the draw, gated samples would lie anywhere."""
    d = dealer()
    prefix = Choice.of(48, gate_share(3**-0.5, d.schedule, d.timesteps), 1.0).prefix(4)
    hand = d.deal(0, 1)[0]
    by_index = hand.t[torch.tensor(hand.sample_indices).argsort()]
    assert any((d.schedule.noise_level(by_index[slot::4]) <= 3**-0.5)[prefix:].any() for slot in range(4))


def test_marginal_of_one_sample_is_the_configured_distribution():
    d = dealer(size=4)
    t = torch.tensor([next(t for i, t in zip(h.sample_indices, h.t) if i % 4 == 0) for h in (d.deal(s, 1)[0] for s in range(4000))])
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean()) < 0.05 and abs(logit.std() - 1) < 0.05


def test_steps_and_seeds_differ():
    assert not torch.equal(dealer().deal(0, 1)[0].t, dealer().deal(1, 1)[0].t)
    assert not torch.equal(dealer().deal(0, 1)[0].t, dealer(seed=4).deal(0, 1)[0].t)


def test_learning_rate():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay="cosine")
    assert [learning_rate(config, s, 8) for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(config, 6, 8) == pytest.approx(0.5)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=4), 1000, 8) == 1.0
