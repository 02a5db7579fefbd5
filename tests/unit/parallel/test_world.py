"""`World` reads torchrun's three environment variables: all of them or none."""

import pytest

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.world import NAMES, World


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_by_default(environment):
    assert World.from_environment() == World(0, 0, 1)


def test_as_torchrun_sets_them(environment):
    for name, value in zip(NAMES, ("5", "1", "8"), strict=True):
        environment.setenv(name, value)
    assert World.from_environment() == World(rank=5, local_rank=1, world_size=8)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RANK": "1"}, "LOCAL_RANK is not set, WORLD_SIZE is not set"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_an_incomplete_environment_is_refused(environment, values, message):
    for name, value in values.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        World.from_environment()
