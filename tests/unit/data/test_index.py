"""index.json and the null texts: every changed field is refused by name, and no file name in them
points outside the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lpl_pretrain.config.data_mixture import merge, read_data
from lpl_pretrain.config.dataset import (
    DatasetIndex,
    changed_contents,
    contents_of,
    digest_of,
    fingerprint_of,
    index_bytes,
    parse_index,
    read_index,
)
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.loop import train
from tests.support.configs import dataset_index, train_config
from tests.support.image_tars import data_config
from tests.support.indexes import as_format_2, rewrite_index
from tests.support.latents import captioned_dataset, tiny_dataset


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Path to every value that is neither a mapping nor a non-empty list."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = False
    for key, child in inner:
        found = True
        yield from leaves(child, (*path, key))
    if not found:
        yield path


def changed(fields: dict, path: tuple, change: Callable[[Any, Any], None]) -> dict:
    copied = copy.deepcopy(fields)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return copied


def nudge(parent: Any, key: Any) -> None:
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = value + 1
    elif isinstance(value, float):
        parent[key] = float(np.nextafter(value, np.inf))
    elif isinstance(value, str):
        parent[key] = value[:-1] + ("0" if value[-1:] != "0" else "1")
    else:
        parent[key] = "x"


def remove(parent: Any, key: Any) -> None:
    del parent[key]


def refused(folder: Path, fields: dict, *fragments: str) -> None:
    with pytest.raises(DataError) as error:
        parse_index(json.dumps(fields).encode(), f"{folder}/index.json")
    for fragment in (f"{folder}/index.json: ", *fragments):
        assert fragment in str(error.value)
    assert "pydantic" not in str(error.value) and len(str(error.value)) < 2000


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder, autoencoder = captioned_dataset(tmp_path_factory.mktemp("captioned"), 12)
    return Path(folder), autoencoder


def test_every_changed_or_removed_field_is_detected(captioned) -> None:
    folder, _ = captioned
    fields = fields_of(folder)
    paths = list(leaves(fields))
    assert (
        len(paths) > 60 and ("latent", "mean", 0) in paths and ("autoencoder", "downscale") in paths
    )
    for path in paths:
        for change in (nudge, remove):
            refused(folder, changed(fields, path, change))
    refused(folder, fields | {"extra": 1}, "digest is")
    refused(
        folder,
        {name: value for name, value in fields.items() if name != "digest"},
        "digest is missing",
    )


def test_without_the_digest_changes_go_undetected(captioned) -> None:
    """Other statistics with a valid digest are accepted: nothing else in the file contradicts
    them.
    """
    folder, _ = captioned
    fields = changed(fields_of(folder), ("latent", "mean", 0), nudge)
    index = DatasetIndex.model_validate(fields)
    fields |= {"fingerprint": fingerprint_of(index)}
    fields |= {"digest": digest_of(fields)}
    assert parse_index(json.dumps(fields).encode(), "x") != read_index(folder)
    refused(folder, fields | {"digest": "0" * 64}, "digest is")


def test_a_remote_index_is_checked_too(captioned) -> None:
    folder, _ = captioned
    memory = fsspec.filesystem("memory")
    memory.pipe("/index/good/index.json", (folder / "index.json").read_bytes())
    assert read_index("memory://index/good") == read_index(folder)
    memory.pipe(
        "/index/bad/index.json",
        (folder / "index.json").read_bytes().replace(b'"samples": 12', b'"samples": 13'),
    )
    with pytest.raises(DataError, match="memory://index/bad/index.json: digest is"):
        read_index("memory://index/bad")


NONSENSE = [
    ({"format_version": True}, "format_version is True, this version reads 2 and 3"),
    ({"format_version": 4}, "format_version is 4"),
    ({"samples": True}, "samples=True: wanted an integer"),
    ({"samples": 12.0}, "samples=12.0: wanted an integer"),
    ({"samples": "12"}, "samples='12': wanted an integer"),
    ({"samples": 0}, "samples=0: wanted 1 to"),
    ({"samples": -5}, "samples=-5"),
    ({"samples": 10**30}, "samples=1000000"),
    ({"samples": 11}, "class_counts: their sum is 12, wanted samples=11"),
    (
        {"samples": 11, "class_counts": [4, 4, 3]},
        "samples: index.json says 11 samples, its shards 12",
    ),
    ({"captions": 13}, "captions=13: wanted 0 to 12"),
    ({"classes": ["a", "b"]}, "class_counts: 3 numbers for 2 classes"),
    ({"class_counts": [4, 4, 5]}, "class_counts: their sum is 13"),
    ({"class_counts": [12, -4, 4]}, "class_counts.1=-4"),
    ({"latent.mean": []}, "latent.mean: 0 numbers for 4 channels"),
    ({"latent.std": [1.0, 1.0, 0.0, 1.0]}, "latent.std.2=0.0: wanted a finite number above 0"),
    ({"latent.std": [1.0, 1.0, -1.0, 1.0]}, "latent.std.2=-1.0"),
    ({"latent.mean": [1, 2, 3, "x"]}, "latent.mean.3='x': wanted a number"),
    ({"latent.channels": 0}, "latent.channels=0"),
    ({"latent.channels": 10**9}, "latent.channels=1000000000"),
    ({"latent.height": 7}, "latent: 7x8 is not the shape of a bucket"),
    ({"buckets": []}, "latent: 8x8 is not the shape of a bucket"),
    ({"buckets.0.samples": 13}, "buckets.0.samples=13: its shards have 12"),
    ({"buckets.0.height": 10**9}, "buckets.0.height=1000000000"),
    ({"resolution_px": 8}, "more than the square of resolution_px=8"),
    ({"autoencoder.downscale": 0}, "autoencoder.downscale=0"),
    ({"autoencoder.downscale": 64}, "more than the square of resolution_px"),
    ({"autoencoder.scale": 0.0}, "autoencoder.scale=0.0"),
    ({"moments_dtype": "fp32"}, "moments_dtype='fp32': wanted 'fp16' or 'bf16'"),
    ({"flipped": 1}, "flipped=1: wanted true or false"),
    ({"text": {}}, "null_text: is of ['clip', 't5'], wanted []"),
    ({"null_text.clip.sha256": "0" * 63}, "null_text.clip.sha256="),
    ({"null_text.clip.bytes": -1}, "null_text.clip.bytes=-1"),
    ({"text.clip.width": 0}, "text.clip.width=0"),
    ({"text.clip.storage": "pickle"}, "text.clip.storage='pickle': wanted 'fp16' or 'int8'"),
    ({"shards": []}, "shards: there is none"),
    ({"shards": {}}, "shards={}: wanted a list"),
    ({"shards.0": 3}, "shards.0=3: wanted a mapping"),
    (
        {"shards.0.file": "../../etc/passwd.tar"},
        "shards.0.file='../../etc/passwd.tar': wanted a plain file name",
    ),
    ({"shards.0.file": "/etc/x.tar"}, "shards.0.file='/etc/x.tar'"),
    ({"shards.0.file": "a/b.tar"}, "shards.0.file="),
    ({"shards.0.file": "..tar"}, "shards.0.file="),
    ({"shards.0.file": "a\n.tar"}, "shards.0.file='a\\n.tar'"),
    ({"shards.0.file": "a\0.tar"}, "shards.0.file="),
    ({"shards.0.file": "a.tar\n"}, "shards.0.file="),
    ({"shards.0.file": "index.json"}, "shards.0.file="),
    ({"shards.0.bucket": 1}, "shards.0.bucket=1: wanted 0 to 0"),
    ({"shards.0.bucket": -1}, "shards.0.bucket=-1"),
    (
        {"shards.0.sha256": "../../../../etc/passwd"},
        "shards.0.sha256='../../../../etc/passwd': wanted 64 hexadecimal digits",
    ),
    ({"shards.0.sha256": "A" * 64}, "shards.0.sha256="),
    ({"shards.0.offsets_sha256": ""}, "shards.0.offsets_sha256=''"),
    ({"shards.0.bytes": 2**70}, "shards.0.bytes="),
    ({"source_fingerprint": "s"}, "source_fingerprint='s'"),
    ({"fingerprint": "0" * 64}, "fingerprint is '000000"),
    ({"shards_fingerprint": "0" * 64}, "fingerprint of the shards is '000000"),
    ({"config": "{"}, "config: is not valid JSON"),
    ({"config": "[]"}, "config: wanted a mapping in JSON"),
    ({"classes": ["a", "b", "\ud800"]}, "index.json: holds half of a surrogate pair"),
    ({"unknown": 1}, "unknown: it is no key of an index"),
]


@pytest.mark.parametrize(
    ("change", "fragment"),
    NONSENSE,
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inconsistent_fields_with_a_valid_digest(captioned, change: dict, fragment: str) -> None:
    folder, _ = captioned
    fields = fields_of(folder)
    for dotted, value in change.items():
        path = tuple(int(key) if key.isdigit() else key for key in dotted.split("."))
        fields = changed(
            fields, path, lambda parent, key, value=value: parent.__setitem__(key, value)
        )
    refused(folder, fields | {"digest": digest_of(fields)}, fragment)


def test_no_field_is_read_as_its_default(captioned) -> None:
    folder, _ = captioned
    for path in (("plan",), ("config",), ("skipped",), ("flipped",), ("autoencoder", "name")):
        fields = changed(fields_of(folder), path, remove)
        refused(folder, fields | {"digest": digest_of(fields)}, f"{path[0]}: a field is missing")


def test_two_shards_of_one_name_are_refused(captioned) -> None:
    folder, _ = captioned
    fields = fields_of(folder)
    assert len(fields["shards"]) > 1
    fields["shards"][1]["file"] = fields["shards"][0]["file"]
    refused(folder, fields | {"digest": digest_of(fields)}, "shards: a file is there twice")


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (b"", "is empty, wanted JSON"),
        (b"\xff\xfe{", "is not UTF-8 (byte 0)"),
        (b'{"samples": 1, "samples": 2}', "key 'samples' is there twice"),
        (b'{"x": NaN}', "holds NaN, which is no JSON number"),
        (b'{"x": -Infinity}', "holds -Infinity, which is no JSON number"),
        (b'{"x": 1e999}', "1e999 is too large"),
        (b'{"x": ' + b"9" * 5000 + b"}", "an integer of 5000 digits, wanted at most 40"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "format_version is None"),
        (b"3", "format_version is None"),
        (b"null", "format_version is None"),
        (b"{}", "format_version is None"),
        (b'{"format_version": 3}', "digest is missing"),
    ],
    ids=range(14),
)
def test_text_that_is_no_index(raw: bytes, fragment: str) -> None:
    with pytest.raises(DataError, match="^x/index.json: ") as error:
        parse_index(raw, "x/index.json")
    assert fragment in str(error.value)


def test_a_huge_or_unreadable_index(tmp_path: Path) -> None:
    with open(tmp_path / "index.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="index.json: has more than .* bytes"):
        read_index(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "index.json").mkdir()
    with pytest.raises(DataError, match="index.json: cannot be read .IsADirectoryError"):
        read_index(tmp_path)
    with pytest.raises(DataError, match="cannot be read .ValueError"):
        read_index("a\0b")
    with pytest.raises(DataError, match="nosuchprotocol://x/index.json: cannot be read"):
        read_index("nosuchprotocol://x")


def test_a_written_index_is_read_back() -> None:
    index = dataset_index()
    assert (
        parse_index(index_bytes(index), "x")
        == parse_index(index.model_dump_json().encode(), "x")
        == index
    )


# --- null texts


def test_any_bit_flip_in_a_null_text_is_detected(captioned, tmp_path: Path) -> None:
    folder, _ = captioned
    index = read_index(folder)
    raw = (folder / "text_clip.null.safetensors").read_bytes()
    assert set(read_null_text(str(folder), index, ["clip", "t5"])) == {"clip", "t5"}
    rng = np.random.default_rng(0)
    copied = tmp_path / "text_clip.null.safetensors"
    for bit in [0, 8 * len(raw) - 1, *rng.integers(0, 8 * len(raw), 20).tolist()]:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        copied.write_bytes(damaged)
        with pytest.raises(DataError, match="text_clip.null.safetensors: sha256 is"):
            read_null_text(str(tmp_path), index, ["clip"])
    copied.write_bytes(raw[:-1])
    with pytest.raises(
        DataError, match="text_clip.null.safetensors: has .* bytes, index.json says"
    ):
        read_null_text(str(tmp_path), index, ["clip"])
    copied.unlink()
    with pytest.raises(DataError, match="text_clip.null.safetensors: not found"):
        read_null_text(str(tmp_path), index, ["clip"])


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (
            lambda tensors: tensors.update(tokens=tensors["tokens"].half()),
            "tokens is not of finite float32 numbers",
        ),
        (
            lambda tensors: tensors["tokens"].fill_(float("nan")),
            "tokens is not of finite float32 numbers",
        ),
        (
            lambda tensors: tensors.update(tokens=tensors["tokens"][:, :-1].contiguous()),
            "tokens has shape",
        ),
        (lambda tensors: tensors.update(tokens=tensors["tokens"][:0]), "tokens has shape"),
        (lambda tensors: tensors.update(tokens=torch.zeros(9)), "tokens has shape"),
        (lambda tensors: tensors.pop("pooled"), "holds tokens, wanted pooled and tokens"),
        (lambda tensors: tensors.update(pooled=tensors["pooled"][:-1]), "pooled has shape"),
    ],
)
def test_a_null_text_of_format_2_is_checked_for_its_shape(
    captioned, tmp_path: Path, change, fragment: str
) -> None:
    folder, _ = captioned
    index = read_index(folder).model_copy(update={"null_text": {}})
    tensors = load_file(folder / "text_clip.null.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "text_clip.null.safetensors")
    with pytest.raises(DataError, match="text_clip.null.safetensors: ") as error:
        read_null_text(str(tmp_path), index, ["clip"])
    assert fragment in str(error.value)


# --- fingerprints, older formats, runs that go on


def test_the_fingerprint_covers_all_training_inputs(captioned) -> None:
    index = read_index(captioned[0])
    assert index.fingerprint == fingerprint_of(index) != index.shards_fingerprint
    latent, autoencoder = index.latent, index.autoencoder
    others = {
        "latent.mean": {"latent": latent.model_copy(update={"mean": [0.0, *latent.mean[1:]]})},
        "latent.std": {"latent": latent.model_copy(update={"std": [*latent.std[:-1], 2.0]})},
        "latent shape": {"latent": latent.model_copy(update={"height": 9})},
        "classes": {"classes": ["x", *index.classes[1:]]},
        "class_counts": {"class_counts": index.class_counts[::-1] + [0]},
        "autoencoder": {"autoencoder": autoencoder.model_copy(update={"downscale": 8})},
        "moments_dtype": {"moments_dtype": "bf16"},
        "null_text.t5": {"null_text": {**index.null_text, "t5": index.null_text["clip"]}},
        "text.t5": {"text": {**index.text, "t5": index.text["clip"]}},
        "resolution_px": {"resolution_px": 64},
        "shards": {"shards_fingerprint": "0" * 64},
    }
    stored = {"fingerprint": index.fingerprint, "contents": contents_of(index)}
    assert changed_contents(stored, index) == []
    for name, update in others.items():
        other = index.model_copy(update=update)
        assert fingerprint_of(other) != index.fingerprint and changed_contents(stored, other) == [
            name
        ]
    moved = index.model_copy(
        update={"autoencoder": autoencoder.model_copy(update={"name": "/elsewhere"}), "plan": "x"}
    )
    assert fingerprint_of(moved) == index.fingerprint
    before_format_3 = {"fingerprint": index.shards_fingerprint}
    assert changed_contents(before_format_3, index) == []
    assert changed_contents({"fingerprint": "0" * 64}, index) == ["shards"]


def test_a_folder_of_format_2_is_read_in_the_same_order(
    data_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = LatentStream(data_config(data_set), 0, 8)
    as_format_2(data_set)
    with caplog.at_level("WARNING", logger="lpl_pretrain"):
        streams = [LatentStream(data_config(data_set), 0, 8) for _ in range(2)]
    assert torch.equal(streams[0].read(range(64)).moments, wanted.read(range(64)).moments)
    assert caplog.text.count("format 2: its index.json and null text have no checksums") == 1
    assert f"lpl-pretrain data seal {data_set}" in caplog.text
    assert streams[0].index.fingerprint == wanted.index.shards_fingerprint


def test_a_format_2_index_with_fields_of_format_3_is_refused(captioned) -> None:
    folder, _ = captioned
    fields = fields_of(folder)
    refused(
        folder,
        fields | {"format_version": 2},
        "format_version is 2, but digest belongs to a later one",
    )
    del fields["digest"]
    refused(folder, fields | {"format_version": 2}, "but null_text belongs to a later one")


def run_to(folder: Path, data: str, autoencoder: str, steps: int) -> bool:
    config = train_config(
        steps=steps,
        autoencoder=autoencoder,
        data={"folder": data, "scaling": "per_channel"},
        checkpoint={"every_steps": 1},
        batch={"global_batch_size": 4},
    )
    run_dir = RunDir(folder)
    folder.mkdir(exist_ok=True)
    return train(config, run_dir, World(), torch.device("cpu"), StopRequest())


def test_a_resumed_run_refuses_other_statistics_by_name(tmp_path: Path) -> None:
    data, autoencoder = tiny_dataset(tmp_path, 8)
    assert run_to(tmp_path / "run", data, autoencoder, 1)

    def other_statistics(fields: dict) -> None:
        fields["latent"]["mean"][1] += 0.25

    rewrite_index(Path(data), other_statistics)
    with pytest.raises(
        CheckpointError,
        match=r"trained on data .*, but data.folder=.* \(different: latent.mean\): name the folder",
    ):
        run_to(tmp_path / "run", data, autoencoder, 2)


def test_a_run_of_format_2_goes_on_before_and_after_the_folder_is_sealed(tmp_path: Path) -> None:
    from lpl_pretrain.encoding.seal import seal

    data, autoencoder = tiny_dataset(tmp_path, 8)
    as_format_2(Path(data))
    old = read_index(data)
    for step in (1, 2):
        assert run_to(tmp_path / "run", data, autoencoder, step)
    sealed = seal(data)
    assert sealed.format_version == 3 and sealed.fingerprint == sealed.order_key == old.fingerprint
    assert read_index(data) == sealed
    assert run_to(tmp_path / "run", data, autoencoder, 3)
    rewrite_index(Path(data), lambda fields: fields["latent"]["std"].__setitem__(0, 3.0))
    with pytest.raises(CheckpointError, match=r"\(different: latent.std\)"):
        run_to(tmp_path / "run", data, autoencoder, 4)


# --- mixtures


def test_a_mixture_covers_the_statistics_of_its_parts(tmp_path: Path) -> None:
    index = dataset_index()
    one, other = (
        merge(["a", "b"], *_halves(index, index)),
        merge(["a", "b"], *_halves(index, _with_mean(index, 0.5))),
    )
    assert one.order_key == other.order_key
    stored = {"fingerprint": one.fingerprint, "contents": contents_of(one)}
    assert changed_contents(stored, other) == ["latent.mean", "latent.std"]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, 0.0])
def test_invalid_weights_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="data.folder.a=.*: wanted a finite weight above 0"):
        read_data({"a": weight, "b": 1.0})


def _halves(*indexes: DatasetIndex):
    from fractions import Fraction

    return [Fraction(1, 2)] * 2, list(indexes)


def _with_mean(index: DatasetIndex, mean: float) -> DatasetIndex:
    return index.model_copy(
        update={"latent": index.latent.model_copy(update={"mean": [mean] * index.latent.channels})}
    )
