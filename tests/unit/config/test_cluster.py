"""Cluster profiles: which values are refused."""

from __future__ import annotations

import pytest

from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.load import load_config, validate
from lpl_pretrain.errors import ConfigError
from tests.support.commands import ROOT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "environment.WANDB_API_KEY: looks like a secret"),
        (
            {"gpus_per_node": 8},
            "processes_per_node=1 with gpus_per_node=8: one process for each GPU",
        ),
        ({"partition": "a b"}, "partition"),
        ({"time_limit_min": 1, "signal_s": 60}, "the signal comes before the job"),
    ],
)
def test_invalid_profiles_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(ClusterProfile, changes, where="profile.yaml")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_all_profiles_load(path):
    load_config(ClusterProfile, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"X": "a\nb"}}, "environment.X: holds the control character"),
        ({"setup": ["true\ntouch PWNED"]}, "setup.0: holds the control character"),
        ({"python": "python\n"}, r"python=.* has the control character"),
        ({"container": ["run\r"]}, r"container.* has the control character"),
        ({"partition": "gpu\n"}, "partition="),
        ({"account": "a b"}, "account="),
        ({"exclude": ["n1\n#SBATCH --uid=0"]}, "exclude.0="),
        ({"environment": {"A B": "x"}}, "environment"),
        (
            {"environment": 5, "setup": 5, "container": {"a": 1}},
            "(?s)setup=5.*container=.*environment=5",
        ),
    ],
)
def test_values_of_profiles_are_plain_lines(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(ClusterProfile, changes, where="profile.yaml")
