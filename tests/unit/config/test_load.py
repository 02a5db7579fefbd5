"""YAML, `base:` deltas and overrides become one frozen configuration; every mistake is named with
its path.
"""

from pathlib import Path

import pytest

from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.evaluation import check_protocol
from lpl_pretrain.config.load import differences, dump, load_config, resolve_path, validate
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
BASE = """
name: tiny
steps: 10
autoencoder: asset:autoencoder_emoji
data: {folder: data/x}
model: {width: 32, depth: 2, heads: 2}
diffusion: {prediction: flow, schedule: rectified_flow}
batch: {global_batch_size: 8}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_delta_over_base_and_overrides(tmp_path, base):
    delta = tmp_path / "delta.yaml"
    delta.write_text("base: base.yaml\nname: other\nlpl: {weight: 2.0}\nmodel: {depth: 3}\n")
    config = load_config(TrainConfig, delta, ["optimizer.lr=3e-4", "steps=20"])
    assert (config.name, config.model.width, config.model.depth, config.steps) == (
        "other",
        32,
        3,
        20,
    )
    assert config.optimizer.lr == 3e-4  # PyYAML reads 3e-4 as text
    assert config.lpl.weight == 2.0
    assert load_config(TrainConfig, delta, ["lpl=null"]).lpl is None


def test_dump_loads_back(tmp_path, base):
    config = load_config(TrainConfig, base, ["lpl.weight=1"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load_config(TrainConfig, again) == config
    assert not differences(config, load_config(TrainConfig, again))


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "batch.global_batchsize=3",
            ["batch.global_batchsize", "did you mean 'global_batch_size'"],
        ),
        ("model.widht=3", ["model.widht: unknown key", "did you mean 'width'"]),
        (
            "model={kind: mmdit, widht: 3, depth: 1, heads: 1}",
            ["model.widht: unknown key", "model.width: missing"],
        ),
        ("model.kind=vit", ["model.kind='vit': wanted one of 'dit', 'mmdit', 'unet'"]),
        ("nonsense=3", ["nonsense: unknown key", "known keys"]),
        ("steps=many", ["steps='many'", "integer"]),
        ("steps=0", ["steps=0", "greater than 0"]),
        ("model.width=33", ["width=33", "heads=2", "multiple"]),
        ("lpl.weight=-1", ["lpl.weight=-1"]),
        ("lpl={}", ["weight", "target_fraction"]),
        ("lpl={weight: 1, target_fraction: 0.2}", ["exactly one of weight and target_fraction"]),
        (
            "lpl={weight: 1, gate: {snr_above: 3, noise_level_below: 3}}",
            ["exactly one of snr_above"],
        ),
        (
            "diffusion.prediction=epsilon",
            ["diffusion.prediction='epsilon'", "'eps', 'v' or 'flow'"],
        ),
        ("parallel.strategy=zero", ["zero_config=None", "zero2.json"]),
    ],
)
def test_mistakes_are_named(base, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, base, [override])
    for word in words:
        assert word in str(error.value)


def test_all_mistakes_at_once(base):
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, base, ["stepz=3", "data.foldr=x", "steps=-1"])
    assert all(word in str(error.value) for word in ("stepz", "data.foldr", "steps=-1"))


def test_missing_file_bad_yaml_and_circles(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(TrainConfig, tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(TrainConfig, tmp_path / "bad.yaml")
    (tmp_path / "circle.yaml").write_text("base: circle.yaml")
    with pytest.raises(ConfigError, match="comes back to itself"):
        load_config(TrainConfig, tmp_path / "circle.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(TrainConfig, tmp_path / "list.yaml")


def test_frozen(base):
    with pytest.raises(Exception, match="frozen"):
        load_config(TrainConfig, base).steps = 3


def test_overrides_have_the_form_key_value(base):
    with pytest.raises(ConfigError, match="key=value"):
        load_config(TrainConfig, base, ["steps"])


def test_assets():
    assert resolve_path("asset:emoji").is_dir()
    assert resolve_path("some/folder") == Path("some/folder")
    with pytest.raises(ConfigError, match="asset:emoji"):
        resolve_path("asset:absent")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train/*.yaml")), ids=lambda p: p.stem)
def test_every_train_config_loads(path):
    assert load_config(TrainConfig, path).name == path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("encode/*.yaml")), ids=lambda p: p.stem)
def test_every_encode_config_loads(path):
    load_config(EncodeConfig, path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("evaluate/*.yaml")), ids=lambda p: p.stem)
def test_every_evaluate_config_loads_and_fits_together(path):
    """Weights files are the only exception: they are the user's."""
    protocol = load_config(EvaluateConfig, path)
    assert protocol.name == path.stem
    with_files = protocol.model_copy(
        update={"extractors": [e.model_copy(update={"weights": None}) for e in protocol.extractors]}
    )
    try:
        check_protocol(with_files)
    except ConfigError as error:
        assert all(".weights=null" in line for line in str(error).splitlines()), error


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="data.folder: missing"):
        validate(TrainConfig, {"data": {}}, where="x")


def test_a_section_of_another_kind_replaces(tmp_path):
    """Widths of a DiT are no settings of a U-Net."""
    (tmp_path / "base.yaml").write_text(BASE.replace("model: {width", "model: {kind: dit, width"))
    (tmp_path / "unet.yaml").write_text("base: base.yaml\nmodel: {kind: unet, preset: ldm}\n")
    (tmp_path / "deep.yaml").write_text("base: base.yaml\nmodel: {kind: dit, depth: 3}\n")
    assert load_config(TrainConfig, tmp_path / "unet.yaml").model.preset == "ldm"
    deep = load_config(TrainConfig, tmp_path / "deep.yaml").model
    assert (deep.depth, deep.width) == (3, 32)


def test_one_of_several_alternatives_replaces_another(tmp_path):
    """Over a base and by an override; two in one place stay a mistake."""
    recipe = CONFIGS / "train/emoji_dit_lpl.yaml"
    config = load_config(TrainConfig, recipe, ["lpl.gate.noise_level_below=0.5", "lpl.weight=2"])
    assert (config.lpl.gate.snr_above, config.lpl.gate.noise_level_below) == (None, 0.5)
    assert (config.lpl.weight, config.lpl.target_fraction) == (2, None)
    delta = tmp_path / "delta.yaml"
    delta.write_text(f"base: {recipe}\nlpl: {{gate: {{noise_level_below: 0.5}}}}\n")
    assert load_config(TrainConfig, delta).lpl.gate.noise_level_below == 0.5
    with pytest.raises(ConfigError, match="exactly one of snr_above"):
        load_config(TrainConfig, recipe, ["lpl.gate.snr_above=3", "lpl.gate.noise_level_below=0.5"])
    delta.write_text(f"base: {recipe}\nlpl: {{gate: {{noise_level_below: 0.5, snr_above: 3}}}}\n")
    with pytest.raises(ConfigError, match="exactly one of snr_above"):
        load_config(TrainConfig, delta)


def test_a_file_inside_an_installed_package():
    assert resolve_path("package:pydantic/main.py").is_file()
    for text in ("package:no_such_package/x", "package:pydantic/no_such_file"):
        with pytest.raises(
            ConfigError, match=f"{text}: no such package, or nothing of that name in it"
        ):
            resolve_path(text)
