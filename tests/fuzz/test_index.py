"""Changed bytes and fields of a data folder: refused by name, or read as exactly what is stored."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from lpl_pretrain.config.dataset import (
    DatasetIndex,
    digest_of,
    fingerprint_of,
    parse_index,
    read_index,
    shards_fingerprint_of,
)
from lpl_pretrain.data.format import NUMPY_DTYPES, scan_shard
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.data.offsets import FIXED, Offsets
from lpl_pretrain.data.shard import OpenShard
from lpl_pretrain.errors import DataError
from tests.support.fuzz import cases
from tests.support.latents import captioned_dataset

PATH = "somewhere/index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(captioned_dataset(tmp_path_factory.mktemp("data"), 9)[0])


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """Path to every value in `value`."""
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [
        found for key, child in inner for found in ((*path, key), *paths_of(child, (*path, key)))
    ]


def refused(error: DataError, name: str) -> None:
    text = str(error)
    assert name in text and len(text) < 4000 and "pydantic" not in text
    text.encode()


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([2**31, 2**53, 2**63, 10**60, -(2**70)]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "../x.tar", "/etc/passwd", "a\0b.tar", "0" * 64, "fp16", "int8", "{}", "\ud800"]
    ),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
)


def with_digests(fields: dict, *, fingerprints: bool) -> dict:
    """`fields` with valid digests, as a careful forger would write them."""
    try:
        if fingerprints:
            index = DatasetIndex.model_validate(fields)
            fields["shards_fingerprint"] = shards_fingerprint_of(index.shards)
            fields["fingerprint"] = fingerprint_of(DatasetIndex.model_validate(fields))
        fields["digest"] = digest_of(fields)
    except ValueError:
        pass  # not even an index
    return fields


@cases(170)
@given(
    number=st.integers(0, 10**6),
    action=st.sampled_from(["replace", "replace", "remove", "add"]),
    value=VALUES,
    forged=st.sampled_from(["not", "digest", "digest and fingerprints"]),
)
@example(number=0, action="remove", value=None, forged="digest")
@example(number=818080, action="remove", value=None, forged="digest")
@example(number=3, action="replace", value=0.5, forged="not")
@example(number=7, action="replace", value=float("nan"), forged="digest")
def test_fields(folder: Path, number: int, action: str, value: Any, forged: str) -> None:
    whole = json.loads((folder / "index.json").read_text())
    fields, paths = copy.deepcopy(whole), paths_of(whole)
    path = paths[number % len(paths)]
    parent = fields
    for key in path[:-1]:
        parent = parent[key]
    if action == "remove":
        del parent[path[-1]]
    elif action == "replace":
        parent[path[-1]] = value
    elif isinstance(parent, dict):
        parent["more"] = value
    else:
        parent.append(value)
    if forged != "not":
        fields = with_digests(fields, fingerprints="fingerprints" in forged)
    raw = json.dumps(fields).encode()
    try:
        index = parse_index(raw, PATH)
    except DataError as error:
        refused(error, PATH)
        return
    assert index.model_dump(mode="json") == json.loads(raw)
    assert forged != "not" or index == parse_index(json.dumps(whole).encode(), PATH)


@cases(60)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_bits_of_the_index(folder: Path, position: int, bit: int) -> None:
    raw = bytearray((folder / "index.json").read_bytes())
    raw[position % len(raw)] ^= 1 << bit
    try:
        assert parse_index(bytes(raw), PATH) == read_index(
            folder
        )  # white space became other white space
    except DataError as error:
        refused(error, PATH)


@cases(60)
@given(which=st.sampled_from(["clip", "t5"]), position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_bits_of_a_null_text(folder: Path, which: str, position: int, bit: int) -> None:
    path = folder / f"text_{which}.null.safetensors"
    whole = path.read_bytes()
    raw = bytearray(whole)
    raw[position % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    try:
        with pytest.raises(DataError, match=path.name):
            read_null_text(str(folder), read_index(folder), [which])
    finally:
        path.write_bytes(whole)
    read_null_text(str(folder), read_index(folder), [which])


def read_all(tar: Path, offsets: Path, index: DatasetIndex, sha256: dict[str, str]) -> None:
    """Reads all of a shard with valid digests.  Raises DataError."""
    entry = index.shards[0].model_copy(update={"bytes": tar.stat().st_size, **sha256})
    shard = OpenShard(tar, offsets, entry, index)
    shape = (2 * index.latent.channels, index.latent.height, index.latent.width)
    for row in range(len(shard.offsets)):
        into = np.empty(shape, NUMPY_DTYPES[index.moments_dtype])
        shard.read_moments(row, False, memoryview(into.reshape(-1).view(np.uint8)))
        assert into.tobytes() in tar.read_bytes()
        shard.read_caption(row)
        for name, text in index.text.items():
            embedding = shard.read_text(row, name, text)
            assert (
                embedding.tokens.shape[1:] == (text.width,)
                and np.isfinite(embedding.floats()).all()
            )
    shard.verify()


def check_outcome(tar: Path, offsets: Path, index: DatasetIndex) -> None:
    digests = {
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "offsets_sha256": hashlib.sha256(offsets.read_bytes()).hexdigest(),
    }
    try:
        read_all(tar, offsets, index, digests)
    except DataError as error:
        refused(error, tar.name.removesuffix(".tar"))


@pytest.fixture(scope="module")
def shard(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """(tar, offsets, path for a changed tar, path for changed offsets)"""
    entry, changed = read_index(folder).shards[0], tmp_path_factory.mktemp("changed")
    files = folder / entry.file, (folder / entry.file).with_suffix(".offsets.safetensors")
    for file in files:
        (changed / file.name).write_bytes(file.read_bytes())
    return *files, *(changed / file.name for file in files)


@cases(60)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7), of_tar=st.booleans())
def test_bits_of_a_shard_and_its_offsets(
    folder: Path, shard, position: int, bit: int, of_tar: bool
) -> None:
    index, (tar, offsets, changed_tar, changed_offsets) = read_index(folder), shard
    whole = (tar if of_tar else offsets).read_bytes()
    raw = bytearray(whole)
    raw[position % len(raw)] ^= 1 << bit
    pair = (changed_tar, offsets) if of_tar else (tar, changed_offsets)
    (changed_tar if of_tar else changed_offsets).write_bytes(raw)
    try:
        reasons = [bad.reason for bad in OpenShard(*pair, index.shards[0], index).verify()]
    except DataError as error:
        reasons = [str(error)]
    assert reasons and all(
        (changed_tar if of_tar else changed_offsets).name in reason for reason in reasons
    )


@cases(60)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4
    ),
    cut=st.integers(0, 5),
)
def test_a_changed_shard_with_a_valid_digest(
    folder: Path, shard, edits: list[tuple[int, bytes]], cut: int
) -> None:
    tar, offsets, changed, _ = shard
    raw = bytearray(tar.read_bytes())
    for position, data in edits:
        at = position % len(raw)
        raw[at : at + len(data)] = data[: len(raw) - at]
    changed.write_bytes(raw[: len(raw) - 512 * cut])
    check_outcome(changed, offsets, read_index(folder))
    try:
        scan_shard(changed)
    except DataError as error:
        refused(error, changed.name)


NUMBERS = st.one_of(
    st.integers(-2, 3), st.sampled_from([2**31 - 1, 2**40, 2**62, 2**63 - 1, -(2**63), 4096])
)


@cases(80)
@given(
    name=st.sampled_from(
        [*FIXED, "member/txt", "member/text_clip.npy", "member/text_t5.npy", "more"]
    ),
    action=st.sampled_from(["value", "value", "value", "drop", "dtype", "shape", "rows"]),
    row=st.integers(0, 100),
    number=NUMBERS,
    is_delta=st.booleans(),
)
@example(name="moments", action="value", row=0, number=2**63 - 1, is_delta=False)
@example(name="member/txt", action="value", row=1, number=2**62, is_delta=False)
def test_changed_offsets_with_a_valid_digest(
    folder: Path, shard, name: str, action: str, row: int, number: int, is_delta: bool
) -> None:
    tar, offsets, _, changed = shard
    index = read_index(folder)
    whole = Offsets.read(offsets, index.shards[0])
    arrays = {field: getattr(whole, field).copy() for field in FIXED}
    arrays |= {f"member/{extension}": spans.copy() for extension, spans in whole.members.items()}
    array = arrays.setdefault(name, np.zeros(len(whole), np.int64))
    if action == "drop":
        del arrays[name]
    elif action == "dtype":
        arrays[name] = array.astype(np.float32)
    elif action == "shape":
        arrays[name] = array.reshape(-1, 1, *array.shape[1:])
    elif action == "rows":
        arrays[name] = array[:-1]
    else:
        flat = array.reshape(-1)
        at = row % flat.size
        limits = np.iinfo(flat.dtype)
        flat[at] = min(max(int(flat[at]) + number if is_delta else number, limits.min), limits.max)
    changed.write_bytes(save(arrays))
    check_outcome(tar, changed, index)
