"""A shard: what is written is what is read, by us and by webdataset; anything else is named."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lpl_pretrain.data.format import END_OF_ARCHIVE, _tar_member, pack_sample, parse_moments, scan_shard
from lpl_pretrain.errors import DataError

SHAPE = (4, 3, 2)


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)


def packed(key: str, number: int = 0) -> bytes:
    return pack_sample(key, moments(number), number, "a caption", {"class_name": "x"})


def write_shard(folder: Path, *blobs: bytes) -> Path:
    path = folder / "latents-000000.tar"
    path.write_bytes(b"".join(blobs) + END_OF_ARCHIVE)
    return path


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(DataError) as error:
        scan_shard(path)
    for fragment in (path.name, *fragments):
        assert fragment in str(error.value)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_round_trip(tmp_path: Path) -> None:
    names = ["a", "class/b", "ünïcode/👩‍🚀", "long/" + "x" * 150]
    path = write_shard(tmp_path, *(packed(key, number) for number, key in enumerate(names)))
    layout = scan_shard(path)
    assert layout.keys == names and layout.labels.tolist() == [0, 1, 2, 3]
    raw = path.read_bytes()
    for number, (offset, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        assert np.array_equal(parse_moments(raw[offset : offset + size], SHAPE, "here"), moments(number))


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    path = write_shard(tmp_path, packed("a"), packed("long/" + "x" * 150, 1))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == ["a", "long/" + "x" * 150]
    assert np.array_equal(samples[1]["moments.npy"], moments(1))
    assert (samples[1]["cls"], samples[1]["txt"], samples[1]["json"]) == (1, "a caption", {"class_name": "x"})


def test_the_tar_command_reads_it(tmp_path: Path) -> None:
    listed = subprocess.run(["tar", "tf", write_shard(tmp_path, packed("a"))], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == ["a.cls", "a.json", "a.moments.npy", "a.txt"] and not listed.stderr


def test_no_label_no_caption(tmp_path: Path) -> None:
    path = write_shard(tmp_path, pack_sample("a", moments(0), None, None, {}))
    assert scan_shard(path).labels.tolist() == [-1]
    assert "txt" not in next(iter(webdataset.WebDataset(str(path), shardshuffle=False)))


def test_bytes_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = packed("a")
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert packed("a") == before


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = write_shard(tmp_path, packed("a"), packed("b"))
    whole = path.read_bytes()
    for length in range(0, len(whole) - len(END_OF_ARCHIVE), 256):
        path.write_bytes(whole[:length])
        refused(path, "truncated")


def test_damaged_header(tmp_path: Path) -> None:
    path = write_shard(tmp_path, packed("a"))
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    refused(path, "byte 0", "damaged")


@pytest.mark.parametrize("extension", ["cls", "json", "moments.npy"])
def test_missing_member(tmp_path: Path, extension: str) -> None:
    blob = {"cls": b"1", "json": b"{}", "moments.npy": npy(moments(0))}
    refused(
        write_shard(tmp_path, packed("a"), *(_tar_member(f"b.{e}", d) for e, d in blob.items() if e != extension)),
        "'b'",
        f"no {extension}",
    )


def test_duplicate_keys(tmp_path: Path) -> None:
    refused(write_shard(tmp_path, packed("a"), packed("a")), "'a' is there twice")
    refused(write_shard(tmp_path, packed("a"), packed("b"), packed("a")), "'a' is there twice")


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a"])
def test_path_traversal(tmp_path: Path, name: str) -> None:
    refused(write_shard(tmp_path, packed(name)), "not a plain relative path", name)


def test_label_that_is_no_number(tmp_path: Path) -> None:
    refused(
        write_shard(tmp_path, _tar_member("a.cls", b"cat"), _tar_member("a.json", b"{}"), _tar_member("a.moments.npy", b"")),
        "'a'",
        "b'cat'",
    )


@pytest.mark.parametrize(
    ("blob", "fragment"),
    [
        (npy(moments(0).astype(np.float32)), "is float32 (4, 3, 2), index.json wants float16"),
        (npy(moments(0)[:2]), "is float16 (2, 3, 2)"),
        (npy(np.asfortranarray(moments(0))), "wants float16 (4, 3, 2)"),
        (npy(np.array([{}], dtype=object)), "is object"),
        (npy(moments(0))[:-2], "has 46 bytes of values, wanted 48"),
        (npy(moments(0))[:40], "not a numpy array"),
        (b"junk", "not a numpy array"),
    ],
)
def test_moments_that_are_something_else(blob: bytes, fragment: str) -> None:
    with pytest.raises(DataError, match="here: ") as error:
        parse_moments(blob, SHAPE, "here")
    assert fragment in str(error.value)


def test_moments_with_another_header_of_the_same_meaning() -> None:
    blob = npy(moments(0)).replace(
        b"'descr': '<f2', 'fortran_order': False, 'shape': (4, 3, 2), ",
        b"'shape': (4, 3, 2), 'fortran_order': False, 'descr': '<f2', ",
    )
    assert blob != npy(moments(0)) and np.array_equal(parse_moments(blob, SHAPE, "here"), moments(0))
