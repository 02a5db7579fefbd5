"""A random draw depends on its seed, purpose and ids, and on nothing else."""

import torch

from lpl_pretrain.runtime import rng


def test_a_row_depends_on_its_id_alone():
    batch = rng.normal(1, "noise", [5, 9, 2], (4, 3))
    single = torch.cat([rng.normal(1, "noise", [i], (4, 3)) for i in (5, 9, 2)])
    assert torch.equal(batch, single)
    assert torch.equal(
        rng.uniform(1, "x", [5, 9]), torch.cat([rng.uniform(1, "x", [5]), rng.uniform(1, "x", [9])])
    )


def test_seed_purpose_and_id_all_matter():
    draws = [
        rng.normal(*arguments, (16,))
        for arguments in ((1, "a", [1]), (2, "a", [1]), (1, "b", [1]), (1, "a", [2]))
    ]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 4


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    first = rng.normal(1, "noise", [1], (4,))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(123)
    assert torch.equal(first, rng.normal(1, "noise", [1], (4,)))


def test_distributions():
    normal = rng.normal(0, "noise", range(400), (64,))
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs(torch.corrcoef(normal[:2])[0, 1]) < 0.5
    uniform = rng.uniform(0, "u", range(4000))
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert abs((uniform < 0.1).double().mean() - 0.1) < 0.02
