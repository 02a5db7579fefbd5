"""LPL's options: what is refused and why, what the presets fill in, and that a resolved
configuration loads back.
"""

import pytest

from lpl_pretrain.config.load import dump, validate
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError
from tests.support.configs import train_config


@pytest.mark.parametrize(
    "lpl, words",
    [
        (
            {"normalize": {"over": "batch", "kind": "l2_norm"}},
            ["lpl.normalize", "over=batch with kind=l2_norm", "use kind=std"],
        ),
        (
            {"normalize": {"over": "time"}},
            ["lpl.normalize.over='time'", "'space', 'channels' or 'batch'"],
        ),
        (
            {"outliers": {"quantiles": [0.98, 0.02]}},
            ["quantiles=[0.98, 0.02]", "the lower one comes first"],
        ),
        (
            {"outliers": {"quantiles": [0.0, 0.5]}},
            ["lpl.outliers.quantiles.0=0.0", "greater than 0"],
        ),
        ({"outliers": {"kernels": [[2, 3]]}}, ["kernels=[[2, 3]]", "odd sides"]),
        ({"outliers": {"kernels": []}}, ["kernels=[]"]),
        ({"outliers": {"enabled": False}}, ["lpl.outliers.enabled", "unknown key"]),
        ({"distance": "l2"}, ["lpl.distance='l2'", "'mse' or 'l1'"]),
        ({"sample_fraction": 0.0}, ["lpl.sample_fraction=0.0"]),
        ({"crop": {"side": 0}}, ["lpl.crop.side=0"]),
        ({"crop": {"halo": 2}}, ["lpl.crop.side", "missing"]),
        ({"depth_weights": [-1.0]}, ["lpl.depth_weights", "greater than or equal to 0"]),
        ({"preset": "papr"}, ["lpl.preset='papr'", "'paper' or 'diffusers_script'"]),
        ({"gate": {}}, ["lpl.gate", "exactly one of snr_above"]),
        ({"target_fraction": 0.2}, ["exactly one of weight and target_fraction"]),
        ({"decoder_precision": "fp16"}, ["lpl.decoder_precision='fp16'"]),
    ],
    ids=str,
)
def test_refused_with_the_remedy(lpl, words):
    raw = {**train_config().model_dump(mode="json"), "lpl": {"weight": 1.0, **lpl}}
    with pytest.raises(ConfigError) as error:
        validate(TrainConfig, raw, "x.yaml")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("share", [0, 0.1])
def test_a_share_of_zero_is_a_run_without_it(share):
    """A baseline equals `lpl: null`, from its identity to its saved file."""
    raw = train_config().model_dump(mode="json")
    config, without = (
        validate(TrainConfig, {**raw, "lpl": lpl}, "x.yaml")
        for lpl in ({"target_fraction": share}, None)
    )
    assert (config == without) is (share == 0) and (config.lpl is None) is (share == 0)


def test_the_public_implementation_as_a_preset():
    lpl = LPLConfig(weight=1.0, preset="diffusers_script")
    assert (
        lpl.gate.timestep_below == 200
        and lpl.normalize.over == "channels"
        and lpl.normalize.source == "target"
    )
    assert (
        lpl.outliers.first_stage == 2
        and lpl.outliers.mean_over == "kept"
        and lpl.depth_weights == "inverse_resolution"
    )


def test_keys_beside_a_preset_win_one_by_one():
    lpl = LPLConfig(
        weight=1.0,
        preset="diffusers_script",
        gate={"snr_above": 4},
        normalize={"source": "own"},
        outliers=None,
        distance="l1",
    )
    assert (lpl.gate.snr_above, lpl.gate.timestep_below) == (4, None)
    assert (
        (lpl.normalize.source, lpl.normalize.kind) == ("own", "l2_norm")
        and lpl.outliers is None
        and lpl.distance == "l1"
    )


@pytest.mark.parametrize(
    "lpl",
    [
        {},
        {"preset": "diffusers_script"},
        {"preset": "diffusers_script", "normalize": None, "outliers": None},
        {"depth_weights": [1.0, 0.5], "stages": ["mid", "up1"], "crop": {"side": 4}},
    ],
    ids=str,
)
def test_a_resolved_configuration_loads_back(lpl, tmp_path):
    from lpl_pretrain.config.load import load_config

    config = train_config(lpl={"weight": 1.0, **lpl})
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
