"""Names and paths in configurations: refused, or one printable path component, or a path that is
used as written.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lpl_pretrain.config.base import Section
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.load import validate
from lpl_pretrain.config.paths import ASSETS, expand, resolve_path
from lpl_pretrain.config.protocol import EvaluateConfig, GuideConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError, LPLError
from tests.support.config_errors import check_error_message
from tests.support.configs import train_config
from tests.support.fuzz import cases

TRAIN = train_config().model_dump(mode="json")
ENCODE = {"source": "a", "output": "b", "autoencoder": "c", "resolution_px": 64}
EVALUATE = {"name": "e", "images": 8, "sampler": {"kind": "euler"}, "reference": "r"}
FOLDER = {"folder": "x"}
Field = tuple[type[Section], Callable[[str], dict[str, Any]]]


def train(**sections: Callable[[str], Any]) -> Field:
    return TrainConfig, lambda text: {
        **TRAIN,
        **{key: make(text) for key, make in sections.items()},
    }


def encode(**sections: Callable[[str], Any]) -> Field:
    return EncodeConfig, lambda text: {
        **ENCODE,
        **{key: make(text) for key, make in sections.items()},
    }


def evaluate(**sections: Callable[[str], Any]) -> Field:
    return EvaluateConfig, lambda text: {
        **EVALUATE,
        **{key: make(text) for key, make in sections.items()},
    }


NAMES: dict[str, Field] = {
    "name": train(name=lambda text: text),
    "log.wandb.project": train(log=lambda text: {"wandb": {"project": text}}),
    "log.wandb.entity": train(log=lambda text: {"wandb": {"entity": text}}),
    "conditioning.text_encoders": train(conditioning=lambda text: {"text_encoders": [text]}),
    "conditioning.text_encoders.0": train(conditioning=lambda text: {"text_encoders": [[text]]}),
    "conditioning.online_encoders": train(
        conditioning=lambda text: {"online_encoders": {text: FOLDER}}
    ),
    "text": encode(text=lambda text: {text: FOLDER}),
    "protocol": evaluate(name=lambda text: text),
    "best": evaluate(best=lambda text: text),
    "extractors.name": evaluate(extractors=lambda text: [{"kind": "timm", "name": text}]),
    "extractors.network": evaluate(extractors=lambda text: [{"kind": "timm", "network": text}]),
}
PATHS: dict[str, Field] = {
    "run_dir": train(run_dir=lambda text: text),
    "autoencoder": train(autoencoder=lambda text: text),
    "data.folder": train(data=lambda text: {"folder": text}),
    "data.folder of several": train(data=lambda text: {"folder": {text: 1.0}}),
    "data.cache.folder": train(data=lambda text: {"folder": "x", "cache": {"folder": text}}),
    "inline_evaluation": train(inline_evaluation=lambda text: text),
    "init_from.run": train(init_from=lambda text: {"run": text}),
    "init_from.file": train(init_from=lambda text: {"file": text}),
    "init_from.diffusers": train(init_from=lambda text: {"diffusers": text}),
    "lpl.decoder": train(lpl=lambda text: {"weight": 1.0, "decoder": text}),
    "parallel.zero_config": train(parallel=lambda text: {"strategy": "zero", "zero_config": text}),
    "conditioning.online_encoders.folder": train(
        conditioning=lambda text: {"online_encoders": {"a": {"folder": text}}}
    ),
    "source": encode(source=lambda text: text),
    "source of several": encode(source=lambda text: [text]),
    "output": encode(output=lambda text: text),
    "encode.autoencoder": encode(autoencoder=lambda text: text),
    "text.folder": encode(text=lambda text: {"a": {"folder": text}}),
    "reference": evaluate(reference=lambda text: text),
    "reference of several": evaluate(reference=lambda text: [text]),
    "guide.run": evaluate(guide=lambda text: {"run": text}),
    "extractors.weights": evaluate(extractors=lambda text: [{"kind": "timm", "weights": text}]),
    "cluster.python": (ClusterProfile, lambda text: {"python": text}),
    "cluster.container": (ClusterProfile, lambda text: {"container": [text]}),
}
CONTROL = ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\x9f", "\u2028", "\u2029", "\udcff"]
texts = st.text(max_size=12) | st.builds(
    lambda before, middle, after: before + middle + after,
    st.sampled_from(["", "a", "..", "~", "x/", "s3://b/", " "]),
    st.sampled_from(
        [*CONTROL, "/", "..", "'", '"', ";", "$(x)", "\\", "é", "x" * 201, "ü" * 130, "p/" * 2100]
    ),
    st.sampled_from(["", "b", "/", " ", "/.."]),
)


def accepted(field: Field, text: str) -> Section | None:
    cls, build = field
    try:
        return validate(cls, build(text), where="x.yaml")
    except LPLError as error:
        check_error_message(error)
        return None


@cases(120)
@given(field=st.sampled_from(sorted(NAMES)), text=texts)
@example(field="name", text="x\n#SBATCH --wrap=id")
@example(field="name", text="a\rb")
@example(field="name", text="..")
@example(field="name", text="/")
@example(field="name", text="../../x")
@example(field="name", text="")
@example(field="name", text="n" * 201)
@example(field="name", text="ü" * 101)
@example(field="protocol", text="..")
def test_a_name_is_one_component(field, text):
    config = accepted(NAMES[field], text)
    assert config is None or (is_plain(text) and "/" not in text and text not in (".", ".."))
    if (
        field in ("name", "log.wandb.project")
        and is_plain(text)
        and "/" not in text
        and text.strip(". ") == text
    ):
        assert (config is not None) is (len(text.encode()) <= 200 and text.strip() == text)
    if config is not None:
        folder = RunDir(Path("runs") / text)
        assert os.path.normpath(folder.best(text)) == f"runs/{text}/evaluations/best_{text}.json"
        assert len(folder.queue_lease(1, text).name.encode()) <= 255


@cases(140)
@given(field=st.sampled_from(sorted(PATHS)), text=texts)
@example(field="run_dir", text="runs/x\n#SBATCH --wrap=id")
@example(field="run_dir", text="runs/x\r")
@example(field="run_dir", text="~nobody-of-this-name/x")
@example(field="run_dir", text="x" * 256)
@example(field="run_dir", text="p/" * 2001)
@example(field="output", text="a\nb")
@example(field="data.folder", text="https://host/" + "q" * 900)
def test_a_path_is_printable(field, text):
    config = accepted(PATHS[field], text)
    assert config is None or (is_plain(text) and len(text.encode()) <= 4000)
    if config is not None and field in ("run_dir", "output"):
        assert str(expand(text)) == str(Path(getattr(config, field)))
        assert config.model_dump(mode="json")[field] == text


def is_plain(text: str) -> bool:
    return text != "" and not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text
    )


inner_paths = st.lists(
    st.sampled_from(
        ["..", ".", "", "etc", "passwd", "main.py", "__init__.py", "emoji", "x\0", "a b"]
    ),
    max_size=6,
)


@cases(60)
@given(
    name=st.sampled_from(
        [
            "click",
            "yaml",
            "a.b",
            "os.path",
            "..",
            "",
            "click.core",
            "six",
            "sys",
            "__main__",
            "ä",
            "x\n",
            "this",
        ]
    ),
    inner=inner_paths.map("/".join),
    kind=st.sampled_from(["package:", "asset:"]),
)
@example(name="a.b", inner="x", kind="package:")
@example(name="click", inner="../../../../../etc/passwd", kind="package:")
@example(name="click", inner="/etc/passwd", kind="package:")
@example(name="emoji", inner="../../../../../../../etc/passwd", kind="asset:")
@example(name="", inner="etc/passwd", kind="asset:")
@example(name="this", inner="x", kind="package:")
def test_packages_and_assets_stay_in_their_folder(name, inner, kind):
    """No package is imported."""
    before = set(sys.modules)
    try:
        resolved = resolve_path(f"{kind}{name}/{inner}")
    except LPLError as error:
        check_error_message(error)
    else:
        folder = ASSETS if kind == "asset:" else Path(sys.modules[name].__file__).parent
        assert Path(os.path.normpath(resolved)).is_relative_to(folder) and resolved.exists()
    assert set(sys.modules) == before


def test_a_package_is_located_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "runs_when_imported"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    (package / "weights.txt").write_text("w")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_path("package:runs_when_imported/weights.txt").read_text() == "w"
    with pytest.raises(ConfigError, match="no such package"):
        resolve_path("package:runs_when_imported.inner/weights.txt")
    assert not (tmp_path / "it_ran").exists()


def test_a_home_folder_is_expanded_once_for_every_consumer(tmp_path, monkeypatch):
    """The saved configuration and the run's identity have the path as written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train_config(
        run_dir="~/r",
        data__folder={"~/d": 1.0},
        init_from={"run": "~/i"},
        lpl={"weight": 1.0, "decoder": "~/x"},
    )
    assert (config.run_dir, list(config.data.folder)) == (f"{tmp_path}/r", [f"{tmp_path}/d"])
    assert (config.init_from.run, config.lpl.decoder) == (f"{tmp_path}/i", f"{tmp_path}/x")
    dumped = config.model_dump(mode="json")
    assert (dumped["run_dir"], list(dumped["data"]["folder"])) == ("~/r", ["~/d"])
    assert (dumped["init_from"]["run"], dumped["lpl"]["decoder"]) == ("~/i", "~/x")
    assert config.model_copy(deep=True) == config
    assert resolve_path("~/y") == expand("~/y") == tmp_path / "y"
    with pytest.raises(pydantic.ValidationError, match="stands for no home folder"):
        GuideConfig(run="~nobody-of-this-name/x")
