"""Shards: our reader and webdataset read what was written; a corrupt shard is refused by name."""

from __future__ import annotations

import hashlib
import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.numpy import save

from lpl_pretrain.config.dataset import ShardEntry
from lpl_pretrain.data.format import (
    CaptionEmbedding,
    Sample,
    npy_header,
    pack_sample,
    scan_shard,
)
from lpl_pretrain.data.offsets import FIXED, Offsets, ShardBuilder, key_at
from lpl_pretrain.data.tar import END_OF_ARCHIVE, tar_member
from lpl_pretrain.errors import DataError

SHAPE = (4, 3, 2)


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)


def packed(key: str, number: int = 0) -> bytes:
    return pack_sample(Sample(key, moments(number), number, "a caption", {"class_name": "x"}))[0]


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


def full_sample(key: str = "a") -> Sample:
    text = CaptionEmbedding(
        np.ones((5, 8), np.int8), np.full(5, 0.5, np.float16), np.zeros(3, np.float16)
    )
    return Sample(key, moments(0), 1, "ünïcode 👩‍🚀", {"x": 1}, moments(1), {"minilm": text})


def test_round_trip(tmp_path: Path) -> None:
    names = ["a", "class/b", "ünïcode/👩‍🚀", "long/" + "x" * 150]
    path = write_shard(tmp_path, *(packed(key, number) for number, key in enumerate(names)))
    samples = scan_shard(path)
    assert list(samples) == names
    raw = path.read_bytes()
    for number, members in enumerate(samples.values()):
        offset, size = members["moments.npy"]
        assert np.array_equal(np.load(io.BytesIO(raw[offset : offset + size])), moments(number))
        assert raw[slice(members["cls"][0], sum(members["cls"]))] == str(number).encode()


@pytest.mark.parametrize("dtype", ["<f2", "<u2", "|i1"])
@pytest.mark.parametrize("shape", [(4, 3, 2), (77, 384), (7,), (1, 1000000)])
def test_headers_equal_those_of_numpy(dtype: str, shape: tuple[int, ...]) -> None:
    assert npy(np.zeros(shape, dtype)).startswith(npy_header(dtype, shape))


def test_offsets_equal_a_walk_of_the_tar(tmp_path: Path) -> None:
    """Samples are added in any order and stored by key; the offsets equal those of a walk through
    the tar's headers.
    """
    shard = ShardBuilder()
    shard.samples = [full_sample("z"), Sample("m", moments(2)), full_sample("a/" + "y" * 150)]
    pieces, offsets = shard.finish()
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(pieces))
    walked = scan_shard(path)
    assert list(walked) == sorted(walked) == ["a/" + "y" * 150, "m", "z"]
    for row, (key, members) in enumerate(walked.items()):
        assert (
            offsets.moments[row] == members["moments.npy"][0] and key_at(path, offsets, row) == key
        )
        assert offsets.label[row] == (-1 if key == "m" else 1)
        for extension, spans in offsets.members.items():
            assert tuple(spans[row]) == members.get(extension, (-1, -1))
    assert set(offsets.members) == {
        "moments_flipped.npy",
        "text_minilm.npy",
        "text_minilm_scale.npy",
        "text_minilm_pooled.npy",
        "txt",
    }
    assert offsets.end[-1] + len(END_OF_ARCHIVE) == path.stat().st_size


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    path = write_shard(tmp_path, packed("a"), packed("long/" + "x" * 150, 1))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == ["a", "long/" + "x" * 150]
    assert np.array_equal(samples[1]["moments.npy"], moments(1))
    assert (samples[1]["cls"], samples[1]["txt"], samples[1]["json"]) == (
        1,
        "a caption",
        {"class_name": "x"},
    )


def test_webdataset_reads_every_member(tmp_path: Path) -> None:
    wanted = full_sample()
    (sample,) = webdataset.WebDataset(
        str(write_shard(tmp_path, pack_sample(wanted)[0])), shardshuffle=False
    ).decode()
    assert (
        np.array_equal(sample["moments_flipped.npy"], wanted.flipped)
        and sample["txt"] == wanted.caption
    )
    text = wanted.text["minilm"]
    restored = CaptionEmbedding(
        sample["text_minilm.npy"], sample["text_minilm_scale.npy"], sample["text_minilm_pooled.npy"]
    )
    assert np.array_equal(restored.floats(), text.floats()) and np.array_equal(
        restored.pooled, text.pooled
    )


def test_bfloat16_is_stored_as_bits(tmp_path: Path) -> None:
    values = torch.randn(SHAPE).bfloat16()
    path = write_shard(
        tmp_path, pack_sample(Sample("a", values.view(torch.int16).numpy().view("<u2")))[0]
    )
    (sample,) = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    assert torch.equal(torch.from_numpy(sample["moments.npy"]).view(torch.bfloat16), values)


def test_a_caption_of_77_tokens_at_width_384_costs_less_than_32_kb() -> None:
    bare = len(packed("a"))
    text = CaptionEmbedding(np.ones((77, 384), np.int8), np.ones(77, np.float16))
    with_text = len(
        pack_sample(
            Sample("a", moments(0), 0, "a caption", {"class_name": "x"}, None, {"minilm": text})
        )[0]
    )
    assert with_text - bare < 32_000
    half = CaptionEmbedding(np.ones((77, 384), np.float16))
    assert (
        len(pack_sample(Sample("a", moments(0), 0, text={"minilm": half}))[0]) - bare > 32_000
    )  # why int8 is the default


def test_the_tar_command_reads_it(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["tar", "tf", write_shard(tmp_path, packed("a"))],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (
        listed.stdout.split() == ["a.cls", "a.json", "a.moments.npy", "a.txt"] and not listed.stderr
    )


def test_no_label_no_caption(tmp_path: Path) -> None:
    path = write_shard(tmp_path, pack_sample(Sample("a", moments(0)))[0])
    (sample,) = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    assert sample["cls"] == -1 and "txt" not in sample


def test_bytes_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = packed("a")
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert packed("a") == before


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path, packed("a"), packed("b"))
    whole = path.read_bytes()
    for length in range(0, len(whole) - len(END_OF_ARCHIVE), 256):
        path.write_bytes(whole[:length])
        refused(path, "truncated")


def test_corrupt_header(tmp_path: Path) -> None:
    path = write_shard(tmp_path, packed("a"))
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    refused(path, "byte 0", "damaged")


@pytest.mark.parametrize("extension", ["cls", "json", "moments.npy"])
def test_missing_member(tmp_path: Path, extension: str) -> None:
    blob = {"cls": b"1", "json": b"{}", "moments.npy": npy(moments(0))}
    refused(
        write_shard(
            tmp_path,
            packed("a"),
            *(tar_member(f"b.{e}", d) for e, d in blob.items() if e != extension),
        ),
        "'b'",
        f"no {extension}",
    )


def test_duplicate_keys(tmp_path: Path) -> None:
    refused(write_shard(tmp_path, packed("a"), packed("a")), "'a' is there twice")
    refused(write_shard(tmp_path, packed("a"), packed("b"), packed("a")), "'a' is there twice")


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a"])
def test_path_traversal(tmp_path: Path, name: str) -> None:
    refused(write_shard(tmp_path, packed(name)), "not a plain relative path", name)


def header_with_size(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with this text as its size and a valid checksum."""
    raw = bytearray(tar_member(name, b"")[:512])
    raw[124:136], raw[156:157] = size.ljust(12, b"\0"), kind
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    "size", [b"-1000", b"1_0", b"+10", b"", b"0x10", b"\x80" + b"\xff" * 11, b" 1 0"]
)
def test_sizes_that_are_no_octal_number(tmp_path: Path, size: bytes) -> None:
    """A negative size would lead back to an earlier header, in an endless loop."""
    refused(
        write_shard(tmp_path, packed("a"), header_with_size("b.cls", size)),
        "no tar header, or a damaged one",
    )


@pytest.mark.parametrize("size", [b"77777777777", b"40000"])
def test_the_size_of_a_long_name_is_checked_before_allocation(tmp_path: Path, size: bytes) -> None:
    refused(
        write_shard(tmp_path, header_with_size("././@LongLink", size, b"L")), "a member name of"
    )


@pytest.mark.parametrize("name", ["a\x85b", "a\udcffb", "x" * 5000])
def test_unprintable_and_long_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="the member name") as error:
        scan_shard(write_shard(tmp_path, packed(name)))
    assert len(str(error.value)) < 6000


# --- inconsistent offsets with a valid digest


def offsets_of(folder: Path, **changed: np.ndarray | None) -> tuple[Path, ShardEntry]:
    shard = ShardBuilder()
    shard.samples = [full_sample("a"), full_sample("b")]
    pieces, offsets = shard.finish()
    arrays = {name: getattr(offsets, name) for name in FIXED} | {
        f"member/{name}": x for name, x in offsets.members.items()
    }
    raw = save({name: array for name, array in (arrays | changed).items() if array is not None})
    (folder / "x.offsets.safetensors").write_bytes(raw)
    size, digest = sum(map(len, pieces)), hashlib.sha256(raw).hexdigest()
    entry = ShardEntry(
        file="x.tar", bucket=0, samples=2, bytes=size, sha256="0" * 64, offsets_sha256=digest
    )
    return folder / "x.offsets.safetensors", entry


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"start": None}, "has no start"),
        ({"more": np.zeros(2, np.int64)}, "holds 'more'"),
        ({"member/../x": np.zeros((2, 2), np.int64)}, "holds 'member/../x'"),
        ({"crc32": np.zeros(2, np.int64)}, "crc32 is int64 (2,), wanted uint32 (2,)"),
        ({"micro": np.zeros((2, 5), np.int32)}, "micro is int32 (2, 5), wanted int32 (2, 6)"),
        ({"label": np.zeros(3, np.int32)}, "has 3 samples, index.json says 2 in x.tar"),
        ({"end": np.array([2**62, 2**63 - 1])}, "samples overlap, or are beyond"),
        ({"start": np.array([-512, 0])}, "samples overlap"),
        ({"moments": np.array([0, 0])}, "moments are outside their sample"),
        ({"member/txt": np.array([[0, 2**62], [0, 1]])}, "txt is outside its sample"),
        (
            {"member/txt": np.array([[2**63 - 1, 2**63 - 1], [-1, -1]])},
            "txt is outside its sample",
        ),
    ],
)
def test_inconsistent_offsets_are_refused(tmp_path: Path, changed: dict, fragment: str) -> None:
    assert len(Offsets.read(*offsets_of(tmp_path))) == 2
    with pytest.raises(DataError, match="x.offsets.safetensors: ") as error:
        Offsets.read(*offsets_of(tmp_path, **changed))
    assert fragment in str(error.value)


def test_a_huge_offsets_file_is_not_read(tmp_path: Path) -> None:
    path, entry = offsets_of(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="has 1099511627776 bytes, wanted at most"):
        Offsets.read(path, entry)
