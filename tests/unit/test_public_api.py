"""The public names of the package: complete, documented, and imported when they are used."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lpl_pretrain

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "diffusers", "numpy", "pydantic", "yaml"}


def heavy_modules_after(statement):
    """Heavy packages that a new Python has imported after a statement."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return HEAVY & set(json.loads(done.stdout))


def test_importing_the_package_imports_nothing_heavy():
    assert not heavy_modules_after("import lpl_pretrain; dir(lpl_pretrain)")


def test_a_heavy_import_is_noticed():
    assert "pydantic" in heavy_modules_after("from lpl_pretrain import TrainConfig")


def test_configurations_are_read_without_torch():
    assert "torch" not in heavy_modules_after("from lpl_pretrain import TrainConfig, load_config")


@pytest.mark.parametrize("name", lpl_pretrain.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(lpl_pretrain, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("lpl_pretrain.")
    assert name in dir(lpl_pretrain)
    assert f"\n{name} " in lpl_pretrain.__doc__


def test_all_is_sorted_and_complete():
    assert lpl_pretrain.__all__ == sorted(lpl_pretrain._MODULES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'perceptual_loss'"):
        _ = lpl_pretrain.perceptual_loss
