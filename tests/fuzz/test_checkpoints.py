"""Fuzzed checkpoints, records and leases are refused with their file's name or read as written."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lpl_pretrain.checkpoint import index as index_module
from lpl_pretrain.config.best import BEST_KEYS, read_best
from lpl_pretrain.config.records import read_record
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, DataError
from lpl_pretrain.runtime.lease import Lease, describe_holder, is_stale, read_lease
from tests.support.checkpoints import (
    content_of,
    edit,
    open_with_defaults,
    rewrite_manifest,
    save,
    state_of,
    tensors_of,
)
from tests.support.fuzz import cases

STEP = 10
FILES = [
    "manifest.json",
    "index.json",
    "state.json",
    "pieces_00000.safetensors",
    "pieces_00001.safetensors",
]
DELETE = "delete"
RENAME = "rename"
DUPLICATE = "duplicate"
ODD_TEXT = [
    "",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "\ud800",
    "x\n\x1b[31m",
    "a" * 5000,
    "F16",
    "step_00000010",
]
ODD_NUMBERS = [
    -1,
    0,
    1,
    2,
    5,
    9,
    11,
    12,
    20,
    80,
    2**31,
    2**63,
    10**19,
    10**40,
    -(10**40),
    1e300,
    float("nan"),
    float("inf"),
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-13, 13),
    st.floats(),
    st.sampled_from([*ODD_NUMBERS, *ODD_TEXT]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 13), max_size=3),
    st.lists(st.lists(st.integers(-2, 13), min_size=3, max_size=3), max_size=3),
    st.dictionaries(st.sampled_from(["a", "bytes", "step", ""]), st.integers(-1, 3), max_size=2),
)
CHANGES = st.one_of(
    st.tuples(st.just("set"), VALUES),
    st.sampled_from([(DELETE, None), (RENAME, None), (DUPLICATE, None)]),
)


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield save(RunDir(Path(folder)), STEP)


@pytest.fixture
def copy(original, tmp_path):
    """Function that restores a copy of the checkpoint to the original."""
    folder = tmp_path / original.name
    undamaged = {path.name: path.read_bytes() for path in original.iterdir()}
    shutil.copytree(original, folder)

    def fresh() -> Path:
        for name, data in undamaged.items():
            if (folder / name).read_bytes() != data:
                (folder / name).write_bytes(data)
        return folder

    return fresh


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of `value` and of every value inside."""
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from paths(inner, (*path, key))


def changed(content: Any, where: int | tuple, change: tuple[str, Any]) -> Any:
    """Replaces, deletes or duplicates one value of `content`, or renames its key.

    `where`: the path of the value, or an index into all paths.
    """
    if isinstance(where, int):
        all_paths = list(paths(content))
        where = all_paths[where % len(all_paths)]
    action, value = change
    if not where:
        return value if action == "set" else None
    parent = content
    for key in where[:-1]:
        parent = parent[key]
    last = where[-1]
    if action == "set":
        parent[last] = value
    elif action == DUPLICATE:
        if isinstance(parent, list):
            parent.insert(last, parent[last])
        else:
            parent[f"{last}_"] = parent[last]
    else:
        old = parent.pop(last)
        if action == RENAME and isinstance(parent, dict):
            parent[f"{last}_"] = old
    return content


def check(folder: Path, *, repaired: bool) -> None:
    """Asserts that the checkpoint is refused with the file's name in a short message, or that its
    tensors are the saved ones and its numbers those on disk.
    """
    try:
        checkpoint = open_with_defaults(folder)
        content = content_of(checkpoint)
    except CheckpointError as error:
        text = str(error)
        assert str(folder) in text and len(text) < len(str(folder)) + 600 and text.isprintable(), (
            text
        )
        return
    wanted = tensors_of(STEP)
    assert content.keys() == wanted.keys()
    for kind, named in wanted.items():
        assert content[kind].keys() == named.keys()
        for name, tensor in named.items():
            assert content[kind][name].dtype == tensor.dtype
            assert torch.equal(content[kind][name], tensor)
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.samples_seen, manifest.world_size) == (STEP, STEP * 8, 2)
    assert (
        checkpoint.state == json.loads((folder / "state.json").read_text())
        and checkpoint.state["step"] == STEP
    )
    assert (
        manifest.optimizer_steps
        == json.loads((folder / "manifest.json").read_text())["optimizer_steps"]
    )
    assert 0 <= manifest.optimizer_steps <= STEP - checkpoint.state["skipped_updates"]
    if not repaired:
        assert checkpoint.state == state_of(STEP) and manifest.optimizer_steps == STEP - 1


def damage_json(
    folder: Path, name: str, where: int | tuple, change: tuple[str, Any], *, repair: bool
) -> None:
    if repair:
        edit(folder, name, lambda content: changed(content, where, change))
    else:
        path = folder / name
        path.write_text(json.dumps(changed(json.loads(path.read_text()), where, change)))


RANGES = ("param", "a.weight", "ranges")


@cases(220)
@given(
    name=st.sampled_from(FILES[:3]), where=st.integers(0, 300), change=CHANGES, repair=st.booleans()
)
@example(name="manifest.json", where=("optimizer_steps",), change=("set", -1), repair=True)
@example(name="manifest.json", where=("step",), change=("set", 20), repair=True)
@example(name="index.json", where=RANGES, change=("set", [[0, 6, 0], [5, 12, 1]]), repair=True)
@example(name="index.json", where=RANGES, change=("set", [[6, 12, 0], [0, 6, 1]]), repair=True)
@example(name="index.json", where=RANGES, change=("set", [[1, 7, 0], [7, 13, 1]]), repair=True)
@example(
    name="index.json", where=("param", "a.weight", "shape"), change=("set", [-4, -3]), repair=True
)
@example(
    name="index.json", where=("param", "a.weight", "shape"), change=("set", [3, 4]), repair=True
)
def test_edited_json(copy, name, where, change, repair):
    folder = copy()
    damage_json(folder, name, where, change, repair=repair)
    check(folder, repaired=repair)


def test_has_teeth_without_the_tiling_check(copy, monkeypatch):
    """Without the check of the ranges, the same edit gives wrong weights, and `check` fails."""
    folder = copy()
    damage_json(folder, "index.json", RANGES, ("set", [[6, 12, 0], [0, 6, 1]]), repair=True)
    check(folder, repaired=True)
    monkeypatch.setattr(index_module, "tiling_problem", lambda shape, ranges: None)
    with pytest.raises(AssertionError):
        check(folder, repaired=True)


@cases(100)
@given(
    name=st.sampled_from(FILES),
    position=st.integers(0, 10_000),
    act=st.sampled_from(["flip", "cut", "insert", "remove", "zero"]),
    bit=st.integers(0, 7),
    repair=st.booleans(),
)
def test_damaged_bytes(copy, name, position, act, bit, repair):
    """`repair` rewrites the manifest, so that its hashes match the damaged files."""
    folder = copy()
    path = folder / name
    data = bytearray(path.read_bytes())
    position %= len(data)
    if act == "flip":
        data[position] ^= 1 << bit
    elif act == "cut":
        del data[position:]
    elif act == "insert":
        data[position:position] = bytes([bit])
    elif act == "remove":
        del data[position : position + bit + 1]
    else:
        data[position:] = bytes(len(data) - position)
    path.write_bytes(data)
    if repair and name in ("index.json", "state.json"):
        rewrite_manifest(folder)
    check(folder, repaired=repair)


@cases(60)
@given(where=st.integers(0, 60), change=CHANGES)
@example(where=("param/b", "data_offsets"), change=("set", [0, 8]))
@example(where=("param/b", "shape"), change=("set", [-2]))
def test_edited_headers(copy, where, change):
    """Edits the header of a rank's file and repairs all hashes."""
    folder = copy()
    path = folder / FILES[3]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(changed(json.loads(data[8 : 8 + length]), where, change)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    rewrite_manifest(folder)
    check(folder, repaired=True)


ENTRY = {"metric": "fid", "value": 3.5, "weights": "ema", "guidance_scale": 1.0}
RECORD = {
    "format_version": 2,
    "step": STEP,
    "protocol": {"name": "quick", "best": "fid"},
    "results": [ENTRY, {**ENTRY, "value": 4}],
}


@cases(60)
@given(where=st.integers(0, 30), change=CHANGES)
@example(where=("step",), change=("set", "10"))
@example(where=("results", 0, "value"), change=("set", float("nan")))
def test_edited_evaluation_records(tmp_path, where, change):
    path = RunDir(tmp_path).evaluation(STEP, "quick")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(changed(json.loads(json.dumps(RECORD)), where, change)))
    try:
        record = read_record(path)
    except DataError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return
    assert record == json.loads(path.read_text())
    if record["format_version"] == 2:
        assert record["step"] == STEP and record["protocol"]["name"] == "quick"
        assert all(
            isinstance(entry["value"], (int, float)) and isinstance(entry["metric"], str)
            for entry in record["results"]
        )


@cases(60)
@given(where=st.integers(0, 6), change=CHANGES, beside=st.booleans())
@example(where=("step",), change=("set", STEP + 10), beside=True)
@example(where=("step",), change=("set", -1), beside=False)
def test_edited_best_files(tmp_path, where, change, beside):
    """Beside the record of its step, only the original values are accepted."""
    run_dir = RunDir(tmp_path)
    path, record = run_dir.best("quick"), run_dir.evaluation(STEP, "quick")
    shutil.rmtree(path.parent, ignore_errors=True)
    record.parent.mkdir(parents=True)
    if beside:
        for step, value in ((STEP, 3.5), (STEP + 10, 5.0)):
            entry = {**RECORD, "step": step, "results": [{**ENTRY, "value": value}]}
            run_dir.evaluation(step, "quick").parent.mkdir(exist_ok=True)
            run_dir.evaluation(step, "quick").write_text(json.dumps(entry))
    before = {"step": STEP, **ENTRY}
    path.write_text(json.dumps(changed(dict(before), where, change)))
    try:
        best = read_best(path)
    except DataError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return
    assert best == json.loads(path.read_text()) and best.keys() == BEST_KEYS
    if beside and best["step"] in (STEP, STEP + 10):
        assert best == before


@cases(60)
@given(where=st.integers(0, 6), change=CHANGES)
@example(where=("pid",), change=("set", "1"))
@example(where=(), change=("set", None))
def test_edited_leases(tmp_path, where, change):
    """A valid lease is respected; any other is taken over at once."""
    path = tmp_path / "live.lease"
    content = {"token": "x", "job": "", "host": "another", "pid": 7, "since": 0.0}
    path.write_text(json.dumps(changed(content, where, change)))
    holder = read_lease(path)
    assert is_stale(path) == (not holder) and "None" not in describe_holder(path)
    assert not holder or (isinstance(holder["host"], str) and holder["pid"] > 0)
    lease = Lease(path)
    assert lease.take() == (not holder)
    lease.release()
    path.unlink(missing_ok=True)
