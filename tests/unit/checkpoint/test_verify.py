"""Opening a checkpoint checks all of it: fields, ranges, headers and hashes."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch

from lpl_pretrain.checkpoint import index as index_module
from lpl_pretrain.checkpoint import manifest as manifest_module
from lpl_pretrain.checkpoint.manifest import Manifest
from lpl_pretrain.checkpoint.weights import read_weights, reconstruct_ema
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from tests.support.checkpoints import (
    IDENTITY,
    content_of,
    edit,
    open_with_defaults,
    rewrite_manifest,
    save,
    shift_range,
    tensors_of,
)


@pytest.fixture(autouse=True)
def propagate_log(monkeypatch):
    """Lets caplog capture the log, whatever a command in this process has set up before."""
    monkeypatch.setattr(manifest_module.log, "propagate", True)


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(tmp_path)


def equals_saved(content, step) -> bool:
    """Whether `content` holds the tensors that were saved at `step`."""
    return all(
        torch.equal(content[kind][name], tensor)
        for kind, named in tensors_of(step).items()
        for name, tensor in named.items()
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_undamaged_checkpoint_is_read_exactly(run_dir, ranks):
    assert equals_saved(content_of(open_with_defaults(save(run_dir, 10, ranks=ranks))), 10)


def set_range(position, *values):
    """Edit of index.json that replaces one range of a parameter."""

    def change(index):
        index["param"]["a.weight"]["ranges"][position] = list(values)

    return change


EDITS = {
    "optimizer_steps -1": (
        "manifest.json",
        {"optimizer_steps": -1},
        "optimizer_steps: found -1, wanted an integer",
    ),
    "more updates than steps": (
        "manifest.json",
        {"optimizer_steps": 11},
        "optimizer_steps: found 11, wanted at most step=10",
    ),
    "step and samples_seen of another step": (
        "manifest.json",
        {"step": 20, "samples_seen": 160},
        "step: found 20, the folder is called step_0+10",
    ),
    "a fraction": ("manifest.json", {"step": 10.0}, r"step: found 10\.0, wanted an integer"),
    "a bool": ("manifest.json", {"world_size": True}, "world_size: found True, wanted an integer"),
    "samples of another batch size": (
        "manifest.json",
        {"samples_seen": 70},
        "samples_seen=70 after 10 steps of 8 samples",
    ),
    "samples that are no multiple of the step": (
        "manifest.json",
        {"samples_seen": 71},
        "samples_seen: found 71, wanted a multiple of step=10",
    ),
    "more ranks": (
        "manifest.json",
        {"world_size": 3},
        "files: 4 are listed, wanted index.json, state.json and one for each of 3",
    ),
    "very many ranks": ("manifest.json", {"world_size": 10**15}, "files: 4 are listed"),
    "an invalid identity": ("manifest.json", {"identity": "x"}, "identity: found 'x'"),
    "an unknown key": ("manifest.json", {"more": 1}, "unknown keys: 'more'"),
    "overlapping ranges": (
        "index.json",
        set_range(1, 5, 12, 1),
        "param/'a.weight': rank 1 owns elements 5..12",
    ),
    "shifted ranges": (
        "index.json",
        set_range(0, 1, 7, 0),
        "param/'a.weight': rank 0 owns elements 1..7",
    ),
    "a gap": ("index.json", set_range(1, 7, 12, 1), "wanted a range that starts at 6"),
    "too short": ("index.json", set_range(1, 6, 11, 1), "ranks own 11 elements of 12"),
    "an empty range": ("index.json", set_range(0, 0, 0, 0), "wanted at least one"),
    "a negative rank": ("index.json", set_range(1, 6, 12, -1), "ranges: found"),
    "an unknown rank": (
        "index.json",
        set_range(1, 6, 12, 7),
        "names rank 7, the manifest says world_size=2",
    ),
    "one rank twice": ("index.json", set_range(1, 6, 12, 0), "rank 0 owns two ranges"),
    "moved boundary": (
        "index.json",
        lambda index: index["param"]["b"].update(ranges=[[0, 3, 0], [3, 5, 1]]),
        "pieces_00000.safetensors: 'param/b' has 2 elements of F32, index.json says 3",
    ),
    "negative shapes": (
        "index.json",
        lambda index: index["param"]["b"].update(shape=[-5]),
        "shape: found .-5.,",
    ),
    "two negative sizes": (
        "index.json",
        lambda index: index["param"]["a.weight"].update(shape=[-4, -3]),
        "shape: found",
    ),
    "a transposed shape": (
        "index.json",
        lambda index: index["ema"]["a.weight"].update(shape=[3, 4]),
        "another kind has .4, 3.",
    ),
    "another type": (
        "index.json",
        lambda index: index["param"]["b"].update(dtype="F16"),
        "dtype: found 'F16'",
    ),
    "a wider dtype": (
        "index.json",
        lambda index: index["param"]["b"].update(dtype="F64"),
        "index.json says 2 of F64",
    ),
    "a missing kind": (
        "index.json",
        lambda index: index.pop("ema") and None,
        "which index.json does not expect there",
    ),
    "an empty kind": ("index.json", lambda index: index.update(more={}), "'more': found {}"),
    "a list": ("index.json", lambda index: [1], "index.json: found .1., wanted an object"),
    "state of another step": (
        "state.json",
        {"step": 9},
        "state.json: step: found 9, the manifest says 10",
    ),
    "a weight that is text": (
        "state.json",
        {"loss_terms": {"lpl": {"frozen": "1", "diffusion_sum": 1.0, "perceptual_sum": 1.0}}},
        "loss_terms.lpl.frozen: found '1', wanted a number or null",
    ),
    "a loss scale of 0": (
        "state.json",
        {"loss_scale": {"value": 0, "dynamic": True, "good_updates": 0}},
        "loss_scale.value: found 0, wanted a number above 0",
    ),
    "no state of the stream": (
        "state.json",
        lambda state: state.pop("stream") and None,
        "state.json: has no stream",
    ),
    "other samples of the stream": (
        "state.json",
        lambda state: state["stream"].update(samples_seen=72),
        "stream.samples_seen: found 72, the manifest says 80",
    ),
    "too many skipped": (
        "state.json",
        {"skipped_updates": 2},
        "skipped_updates: found 2 beside 9 updates",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_is_detected_though_all_hashes_are_right(run_dir, name):
    file, change, message = EDITS[name]
    folder = save(run_dir, 10)
    assert equals_saved(content_of(open_with_defaults(folder)), 10)
    edit(folder, file, change if callable(change) else lambda content: content.update(change))
    with pytest.raises(DamagedCheckpointError, match=message):
        open_with_defaults(folder)


def test_an_edited_manifest_is_detected_by_its_digest(run_dir):
    """The edited value is a valid one."""
    folder = save(run_dir, 10)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"optimizer_steps": 9', '"optimizer_steps": 8'))
    with pytest.raises(
        DamagedCheckpointError,
        match="manifest.json: digest: found .*: it was changed after it was written",
    ):
        open_with_defaults(folder)


def test_a_manifest_without_its_digest_is_damaged(run_dir):
    folder = save(run_dir, 10)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "digest"}))
    with pytest.raises(DamagedCheckpointError, match="digest: found None"):
        open_with_defaults(folder)
    path.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(DamagedCheckpointError, match="unknown keys: 'digest'"):
        open_with_defaults(folder)


def test_format_2_is_read_and_checked(run_dir, monkeypatch):
    """Old runs can be resumed; the log says once that their manifests have no digest."""
    messages: list[str] = []
    monkeypatch.setattr(
        manifest_module.log, "info", lambda form, *values: messages.append(form % values)
    )
    manifest_module._note_old_format.cache_clear()
    folder = save(run_dir, 10, format=2)
    for _ in range(2):
        assert equals_saved(content_of(open_with_defaults(folder)), 10)
    assert messages == [
        "checkpoint format 2 has no digest of its manifest: its fields are checked instead"
    ]
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "optimizer_steps": -1}))
    with pytest.raises(DamagedCheckpointError, match="optimizer_steps: found -1"):
        open_with_defaults(folder)


def test_has_teeth_without_the_tiling_check(run_dir, monkeypatch):
    """Swapped ranges give wrong weights: each file holds a tensor of the listed size, but for other
    elements.
    """
    folder = save(run_dir, 10)

    def swap(index):
        index["param"]["a.weight"]["ranges"] = [[6, 12, 0], [0, 6, 1]]

    edit(folder, "index.json", swap)
    with pytest.raises(
        DamagedCheckpointError, match="rank 0 owns elements 6..12, wanted a range that starts at 0"
    ):
        open_with_defaults(folder)
    monkeypatch.setattr(index_module, "tiling_problem", lambda shape, ranges: None)
    content = content_of(open_with_defaults(folder))
    assert not torch.equal(content["param"]["a.weight"], tensors_of(10)["param"]["a.weight"])
    assert torch.equal(content["param"]["b"], tensors_of(10)["param"]["b"])


CORRUPTIONS = {
    "a link": (
        lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
        "is a symbolic link, wanted a regular file",
    ),
    "a directory": (
        lambda path: (path.unlink(), path.mkdir()),
        "is a directory, wanted a regular file|No such file",
    ),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe, a socket or a device"),
    "an empty file": (
        lambda path: path.write_bytes(b""),
        "0 bytes, the manifest says|is empty, wanted JSON",
    ),
    "a truncated file": (
        lambda path: os.truncate(path, path.stat().st_size // 2),
        "bytes, the manifest says|is not valid JSON",
    ),
    "a missing file": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize(
    "name", ["manifest.json", "index.json", "state.json", "pieces_00001.safetensors"]
)
def test_every_file_must_be_a_complete_regular_file(run_dir, name, corruption):
    corrupt, message = CORRUPTIONS[corruption]
    folder = save(run_dir, 10)
    corrupt(folder / name)
    with pytest.raises(DamagedCheckpointError, match=message) as caught:
        open_with_defaults(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": NaN}', "holds NaN, which is no JSON number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ("\ufeff{}", "is not valid JSON"),
        ("null", "found None, wanted an object"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "index.json", "state.json"])
def test_invalid_json_is_refused(run_dir, name, text, message):
    folder = save(run_dir, 10)
    (folder / name).write_text(text)
    if name != "manifest.json":
        rewrite_manifest(folder)
    with pytest.raises(DamagedCheckpointError, match=f"{name}: .*{message}|{name}: {message}"):
        open_with_defaults(folder)
    (folder / name).write_bytes(b'{"\xff": 1}')
    if name != "manifest.json":
        rewrite_manifest(folder)
    with pytest.raises(DamagedCheckpointError, match=f"{name}: is not UTF-8"):
        open_with_defaults(folder)


def rewrite_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["param/b"].update(dtype="I32"), "dtype 'I32'"),
        (lambda h: h["param/b"].update(shape=[2, 1]), "shape .2, 1., wanted one length"),
        (lambda h: h["param/b"].update(data_offsets=[0, 8]), "data_offsets"),
        (lambda h: h.update({"ema/c": h.pop("ema/b")}), "data_offsets|holds 'ema/c'"),
        (lambda h: h.update(__metadata__={"a": "b"}), "__metadata__"),
        (lambda h: h.pop(list(h)[-1]), "bytes of data, the header says"),
    ],
)
def test_headers_must_agree_with_the_index(run_dir, change, message):
    folder = save(run_dir, 10)
    rewrite_header(folder / "pieces_00000.safetensors", change)
    rewrite_manifest(folder)
    with pytest.raises(DamagedCheckpointError, match=f"pieces_00000.safetensors: .*({message})"):
        open_with_defaults(folder)


def test_a_header_that_is_no_json_object_within_the_file_is_refused(run_dir):
    folder = save(run_dir, 10)
    for data in (
        b"\xff" * 64,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"\x01",
    ):
        (folder / "pieces_00000.safetensors").write_bytes(data.ljust(300, b" "))
        rewrite_manifest(folder)
        with pytest.raises(DamagedCheckpointError, match="pieces_00000.safetensors"):
            open_with_defaults(folder)


def test_an_invalid_manifest_is_not_written(tmp_path, run_dir):
    manifest = Manifest.read(save(run_dir, 10))
    for changes, message in (
        ({"optimizer_steps": 11}, "optimizer_steps: found 11"),
        ({"world_size": 3}, "files: 4 are listed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Manifest(**{**vars(manifest), **changes}).write(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.fixture
def three(run_dir):
    for step in (10, 20, 30):
        save(run_dir, step)
    return run_dir


def test_weights_come_from_the_newest_undamaged_checkpoint(three, caplog):
    """All commands skip damaged ones with a warning, and refuse a damaged one that is named."""
    shift_range(three.checkpoint(30))
    tensors, metadata = read_weights(three, "ema", None, IDENTITY)
    assert metadata["step"] == "20" and torch.equal(tensors["b"], tensors_of(20)["ema"]["b"])
    assert "DAMAGED CHECKPOINT step_00000030: passed over for an older one" in caplog.text
    assert "index.json: param/'a.weight': rank 0 owns elements 1..7" in caplog.text
    with pytest.raises(
        CheckpointError, match="step_00000030/index.json: .*: bring it back, or name another --step"
    ):
        read_weights(three, "ema", 30, IDENTITY)
    with pytest.raises(
        CheckpointError, match="another configuration \\(111111111111, this one is 222222222222\\)"
    ):
        read_weights(three, "ema", 20, "2" * 64)
    for step in (10, 20):
        shift_range(three.checkpoint(step))
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        read_weights(three, "ema", None, IDENTITY)


def test_renamed_copied_and_linked_folders_are_damaged(three):
    three.checkpoint(30).rename(three.checkpoint(40))
    shutil.copytree(three.checkpoint(20), three.checkpoint(50))
    three.checkpoint(60).symlink_to(three.checkpoint(10))
    three.checkpoint(10**30).symlink_to(three.checkpoint(10))
    (three.checkpoints / "step_000000020").symlink_to(three.checkpoint(20))
    assert three.complete_checkpoints() == [10, 20, 40, 50, 60, 10**30]
    assert read_weights(three, "ema", None)[1]["step"] == "20"
    with pytest.raises(
        CheckpointError,
        match="step: found 20, the folder is called step_00000050: it was renamed or copied",
    ):
        read_weights(three, "ema", 50)


def test_only_the_newest_snapshot_may_be_damaged(run_dir, caplog):
    """Without an earlier one the reconstructed EMA would be another."""
    for step in (10, 20, 30):
        save(run_dir, step, snapshot=True)

    def rebuilt(step):
        _, metadata = reconstruct_ema(run_dir, (0.05,), 0.08, step, IDENTITY)
        return metadata["step"], metadata["snapshots"]

    assert rebuilt(None) == ("30", "3")
    shift_range(run_dir.snapshot(30))
    assert rebuilt(None) == ("20", "2") and "DAMAGED CHECKPOINT step_00000030" in caplog.text
    with pytest.raises(CheckpointError, match="snapshots/step_00000030/index.json"):
        rebuilt(30)
    shift_range(run_dir.snapshot(10))
    with pytest.raises(
        CheckpointError, match="snapshots/step_00000010/index.json: .*bring this snapshot back"
    ):
        rebuilt(None)
    shift_range(run_dir.snapshot(20))
    with pytest.raises(CheckpointError, match="all 3 snapshots are damaged"):
        rebuilt(None)
    with pytest.raises(CheckpointError, match="no snapshot of step any"):
        reconstruct_ema(run_dir, (), 0.08, None)
