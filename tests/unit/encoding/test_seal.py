"""Folders of format 2: read, verified, and upgraded to format 3 only if they are consistent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lpl_pretrain.cli.main import commands
from lpl_pretrain.config.dataset import index_bytes, parse_index, read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.encoding.plan import make_plan
from lpl_pretrain.encoding.seal import seal
from lpl_pretrain.encoding.verify import verify
from lpl_pretrain.errors import DataError
from tests.support.image_tars import encode_config, encode_dataset
from tests.support.indexes import as_format_2
from tests.support.text_encoders import text_encoder_folder
from tests.unit.encoding.test_verify import SmoothAutoencoder, smooth_tar


@pytest.fixture(scope="module")
def old_once(tmp_path_factory: pytest.TempPathFactory) -> EncodeConfig:
    base = tmp_path_factory.mktemp("old")
    config = encode_config(
        smooth_tar(base / "x.tar", 7),
        base / "latents",
        buckets={"max_aspect": 3.0, "step_px": 4},
        shard_samples=3,
        text={"bert": {"folder": text_encoder_folder(base / "bert", "bert")}},
    )
    index = encode_dataset(config, SmoothAutoencoder())
    as_format_2(base / "latents")
    plan = make_plan(config, {"autoencoder": "fake", "text.bert": index.text["bert"].identity})
    assert plan.identity == index.plan != plan.earlier_identity
    rewrite_2(base / "latents", lambda fields: fields.update(plan=plan.earlier_identity))
    return config


@pytest.fixture
def old(old_once: EncodeConfig, tmp_path: Path) -> EncodeConfig:
    """A finished folder as an earlier version left it."""
    shutil.copytree(old_once.output, tmp_path / "latents")
    return old_once.model_copy(update={"output": str(tmp_path / "latents")})


def rewrite_2(folder: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads((folder / "index.json").read_text())
    change(fields)
    (folder / "index.json").write_text(json.dumps(fields))


def test_a_sealed_folder_equals_a_new_one(old: EncodeConfig, tmp_path: Path) -> None:
    before = read_index(old.output)
    assert before.format_version == 2 and before.digest == "" and before.null_text == {}
    sealed = seal(old.output)
    fresh = encode_dataset(
        old.model_copy(update={"output": str(tmp_path / "fresh")}), SmoothAutoencoder()
    )
    changed = {
        name for name in type(fresh).model_fields if getattr(fresh, name) != getattr(sealed, name)
    }
    assert changed == {"digest", "plan", "fingerprint"} and sealed.null_text["bert"].bytes > 0
    assert sealed.fingerprint == before.fingerprint == fresh.order_key
    raw = (tmp_path / "latents" / "index.json").read_bytes()
    assert parse_index(raw, "x") == sealed and index_bytes(sealed) == raw
    assert seal(old.output) == sealed and (tmp_path / "latents" / "index.json").read_bytes() == raw
    assert verify(old, 7, SmoothAutoencoder()).is_sound


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda fields: fields["latent"]["mean"].__setitem__(0, 0.5), "latent.mean: "),
        (lambda fields: fields["latent"]["std"].__setitem__(1, 0.5), "latent.std: "),
        (
            lambda fields: fields["classes"].reverse(),
            "classes: index.json names them otherwise than 7 samples",
        ),
        (lambda fields: fields["class_counts"].reverse(), "class counts"),
        (lambda fields: fields.update(captions=2), "captions: 7 in the shards, index.json says 2"),
        (lambda fields: fields.update(source_fingerprint="0" * 64), "source_fingerprint: "),
        (
            lambda fields: fields["shards"][0].update(sha256="0" * 64),
            "fingerprint of the shards is",
        ),
    ],
    ids=range(7),
)
def test_an_inconsistent_folder_is_not_sealed(
    old: EncodeConfig, tmp_path: Path, change, fragment: str
) -> None:
    if "classes" in fragment:
        change = lambda fields: fields["classes"].__setitem__(slice(None), ["x", "y", "z"])  # noqa: E731
    rewrite_2(tmp_path / "latents", change)
    before = (tmp_path / "latents" / "index.json").read_bytes()
    with pytest.raises(DataError) as error:
        seal(old.output)
    assert (
        fragment in str(error.value)
        and (tmp_path / "latents" / "index.json").read_bytes() == before
    )
    assert not verify(old, 7, SmoothAutoencoder()).is_sound


def test_a_corrupt_null_text_is_not_sealed(old: EncodeConfig, tmp_path: Path) -> None:
    file = tmp_path / "latents" / "text_bert.null.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + b"\x80\x7f")  # infinity in float32
    with pytest.raises(
        DataError, match="text_bert.null.safetensors: tokens is not of finite float32"
    ):
        seal(old.output)
    file.write_bytes(whole[:-2] + b"\x80\x40")  # 4.0: only the encoder knows better
    assert (
        "text_bert: its tokens differ from the encoder's output for the empty caption"
        in verify(old, 7, SmoothAutoencoder()).table()
    )


def test_an_old_folder_is_left_alone_by_encode(
    old: EncodeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "latents").iterdir()}
    with caplog.at_level("INFO", logger="lpl_pretrain"):
        assert encode(old, SmoothAutoencoder()) == read_index(old.output)
    assert {path: path.read_bytes() for path in (tmp_path / "latents").iterdir()} == before
    for fragment in (
        "left alone",
        "format 2",
        "data seal",
        "an earlier version, which ignored colour profiles",
    ):
        assert fragment in caplog.text
    assert verify(old, 7, SmoothAutoencoder()).is_sound


def test_command(old: EncodeConfig, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(commands, ["data", "show", old.output, "--pictures", "0"])
    assert "format       2, without checksums of its index and null texts" in shown.output
    first, second = (run(commands, ["data", "seal", old.output]) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert (
        "7 samples compared with the index; format 2 is now 3" in first.output
        and "left alone" in second.output
    )
    with pytest.raises(DataError, match="memory://x: only a local folder can be sealed"):
        seal("memory://x")
