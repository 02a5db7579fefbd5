"""Sources of images: every kind of source and pixel format; errors name the file and the sample."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lpl_pretrain.data.format import scan_shard
from lpl_pretrain.encoding.decode_image import MAX_PIXELS
from lpl_pretrain.encoding.sources import list_images, list_units
from lpl_pretrain.errors import DataError
from tests.support.image_tars import (
    FakeAutoencoder,
    encode_config,
    encode_dataset,
    encode_image,
    image_tar,
    random_image,
    tar_sample,
    write_tar,
)


def keys(source: Path | list[str]) -> list[str]:
    return [p.key for p in list_images(str(source) if isinstance(source, Path) else source)]


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(
            encode_image(
                random_image(number),
                {".png": "PNG", ".webp": "WEBP"}.get(file.suffix.lower(), "JPEG"),
            )
        )
    return folder


def refused(source: Path, *fragments: str) -> None:
    with pytest.raises(DataError) as error:
        for image in list_images(str(source)):
            image.load()
    for fragment in fragments:
        assert fragment in str(error.value)


def test_class_folders_in_sorted_order(tmp_path: Path) -> None:
    write_images(
        tmp_path, "dog/b.png", "cat/z.jpg", "dog/A.JPEG", "cat/deep/y.webp", ".cache/x.png"
    )
    (tmp_path / "cat" / "notes.md").write_text("not an image")
    images = list(list_images(str(tmp_path)))
    assert [(p.key, p.label, p.class_name) for p in images] == [
        ("cat/deep/y", 0, "cat"),
        ("cat/z", 0, "cat"),
        ("dog/A", 1, "dog"),
        ("dog/b", 1, "dog"),
    ]
    assert all(p.load().shape == (16, 16, 3) and p.load().dtype == np.uint8 for p in images)


def test_ignored_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "dog/b.png", "cat/z.jpg")
    (tmp_path / "cat" / "moving.gif").write_bytes(b"GIF89a")
    with caplog.at_level("INFO", logger="lpl_pretrain"):
        assert len(keys(tmp_path)) == 2
    assert (
        "1 files are neither images nor tars and are ignored, such as cat/moving.gif" in caplog.text
    )


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    images = list(list_images(str(write_images(tmp_path, "b.png", "a.v2.png"))))
    assert [(p.key, p.label, p.class_name) for p in images] == [
        ("a_v2", None, None),
        ("b", None, None),
    ]


def test_tar_with_labels_and_captions(tmp_path: Path) -> None:
    first, second = list_images(str(image_tar(tmp_path / "x.tar", 2)))
    assert (second.key, second.label, second.class_name, second.caption) == (
        "p0001",
        1,
        "food",
        "picture 1",
    )
    assert second.origin == f"{tmp_path}/x.tar:p0001.png"
    assert np.array_equal(first.load(), random_image(0))


def test_folder_of_tars_and_lists(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "b.tar", tar_sample(1))
    write_tar(tars / "a.tar", tar_sample(2))
    (tars / "a.parquet").write_bytes(b"img2dataset writes such files beside its tars")
    write_images(tmp_path / "more", "c/q.png")
    assert keys(tars) == ["p0002", "p0001"]
    assert keys([str(tmp_path / "more"), str(tars)]) == ["c/q", "p0002", "p0001"]


def test_shipped_emoji() -> None:
    image = next(list_images("asset:emoji/held_out.tar"))
    assert image.load().shape == (64, 64, 3) and image.class_name and image.caption


def test_tar_of_a_folder_with_dot_slash_names(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "sub", "p.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    assert keys(tmp_path / "x.tar") == ["sub/p"]


def test_truncated_image_names_shard_and_key(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        tar_sample(0) + tar_sample(1, png=encode_image(random_image(1, 64, 64))[:2000]),
    )
    refused(tar, "x.tar:p0001.png", "not a readable image")


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"hello")
    refused(tmp_path, "x.png", "not a readable image")


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 9_900, 24_500])
def test_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    tar = write_tar(tmp_path / "x.tar", tar_sample(3, png=bomb(side, side)))
    refused(tar, "x.tar:p0003.png", "too large", f"{MAX_PIXELS:,} pixels")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.9])
def test_truncated_tar(tmp_path: Path, keep: float) -> None:
    whole = image_tar(tmp_path / "whole.tar", 8).read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: int(end * keep)])
    refused(cut, "cut.tar", "truncated")


def test_a_tar_truncated_between_two_members(tmp_path: Path) -> None:
    """`tarfile` takes such a tar for complete."""
    one, two = write_tar(tmp_path / "a.tar", tar_sample(0)), tmp_path / "cut.tar"
    with tarfile.open(one) as tar:
        last = tar.getmembers()[-1]
    two.write_bytes(one.read_bytes()[: last.offset_data + 512])
    with tarfile.open(two) as tar:
        assert len(tar.getmembers()) == 4
    refused(two, "cut.tar", "end mark")


def test_corrupt_header_in_the_middle(tmp_path: Path) -> None:
    tar = image_tar(tmp_path / "x.tar", 3)
    raw = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        raw[members.getmembers()[5].offset + 150] ^= 255
    tar.write_bytes(raw)
    refused(tar, "x.tar", "neither a member nor the end mark")


def test_compressed_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    refused(tmp_path / "x.tar", "x.tar", "decompress")


@pytest.mark.parametrize(
    "name", ["../p.png", "/etc/p.png", "a/../../p.png", "a//p.png", "a\\..\\p.png", "a\n.png"]
)
def test_path_traversal(tmp_path: Path, name: str) -> None:
    refused(
        write_tar(tmp_path / "x.tar", [(name, encode_image(random_image(0)))]),
        "x.tar",
        repr(name),
        "not a plain relative path",
    )


def test_links_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("p.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(link)
    refused(tmp_path / "x.tar", "x.tar", "'p.png' is a link")


@pytest.mark.parametrize(
    ("replaced", "fragment"),
    [
        ({"png": None}, "has 0 images"),
        ({"jpg": encode_image(random_image(0), "JPEG")}, "has 2 images"),
        ({"cls": b"-1"}, "class id -1 is out of range"),
        ({"cls": b"cat"}, "not an integer"),
        ({"json": b"{"}, "not an integer, JSON"),
        ({"txt": b"\xff\xfe"}, "UTF-8"),
    ],
)
def test_bad_members_name_shard_and_key(tmp_path: Path, replaced: dict, fragment: str) -> None:
    refused(
        write_tar(tmp_path / "x.tar", tar_sample(0) + tar_sample(4, **replaced)),
        "x.tar",
        "p0004",
        fragment,
    )


def test_duplicate_keys(tmp_path: Path) -> None:
    refused(
        write_tar(tmp_path / "x.tar", tar_sample(0) + tar_sample(1) + tar_sample(0)),
        "x.tar:p0000.png",
        "twice",
    )
    refused(
        write_tar(tmp_path / "y.tar", tar_sample(0) + tar_sample(0)),
        "y.tar",
        "'p0000.png' is there twice",
    )
    with pytest.raises(DataError, match="z.tar:p0001.png.*twice"):
        keys([str(write_tar(tmp_path / name, tar_sample(1))) for name in ("a.tar", "z.tar")])
    refused(write_images(tmp_path / "folder", "c/a.png", "c/a.jpg"), "c/a.png", "twice")


def test_nothing_to_read(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "no images")
    refused(tmp_path / "missing", "missing", "found nothing")
    refused(write_tar(tmp_path / "empty.tar", []), "empty.tar", "no images")
    (tmp_path / "zero.tar").write_bytes(b"")
    refused(tmp_path / "zero.tar", "zero.tar")
    (tmp_path / "text.md").write_text("")
    refused(tmp_path / "text.md", "no .tar")
    with pytest.raises(DataError, match="no images"):
        keys([])


def test_ambiguous_folders(tmp_path: Path) -> None:
    refused(write_images(tmp_path / "a", "x.png", "cat/y.png"), "images and sub-folders")
    write_images(tmp_path / "b", "x.png")
    image_tar(tmp_path / "b" / "x.tar", 1)
    refused(tmp_path / "b", "tars and images")
    write_images(tmp_path / "c", "cat/y.png")
    (tmp_path / "c" / "dog").mkdir()
    refused(tmp_path / "c", "c/dog", "no images in this class folder")


@pytest.mark.parametrize(
    "names", ["p{:03d}", "a/rather/long/folder/{:03d}" + "x" * 120, "ünïcode/👩‍🚀/{:03d}"]
)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_can_be_read_from_any_sample(tmp_path: Path, names: str, kind: int) -> None:
    """A part of a large tar is read without walking through the samples before it."""
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for number in range(6):
            for name, data in tar_sample(number):
                info = tarfile.TarInfo(names.format(number) + name[name.index(".") :])
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (unit,) = list_units(str(tmp_path / "x.tar"))
    whole = list(unit.images())
    for number, image in enumerate(whole):
        assert list(unit.images(start=image.start)) == whole[number:]


def test_one_large_tar_with_bad_members_at_every_part(tmp_path: Path) -> None:
    members = []
    for number in range(30):
        broken = (
            {"png": None} if number % 5 in (0, 4) else {"cls": b"cat"} if number % 7 == 3 else {}
        )
        members += tar_sample(number, **broken) + (
            [("../evil.png", b"")] if number % 6 == 5 else []
        )
    tar = write_tar(tmp_path / "x.tar", members)
    options = {"on_error": "skip", "max_skipped_fraction": 1.0}
    keys_of = []
    for shard_samples in (3, 4, 1000):
        output = tmp_path / f"latents{shard_samples}"
        index = encode_dataset(
            encode_config(tar, output, shard_samples=shard_samples, **options), FakeAutoencoder()
        )
        keys_of.append(
            (
                sorted(key for shard in index.shards for key in scan_shard(output / shard.file)),
                index.skipped,
            )
        )
    assert keys_of[0] == keys_of[1] == keys_of[2] and len(keys_of[0][0]) > 10


# --- hostile members and archives


@pytest.mark.parametrize(
    ("raw", "label"),
    [(b"7", 7), (b" 7 ", 7), (b"7\n", 7), (b"7\r\n", 7), (b"007", 7), (b"-0", 0), (b"\t12\t", 12)],
)
def test_valid_class_ids(tmp_path: Path, raw: bytes, label: int) -> None:
    (image,) = list_images(str(write_tar(tmp_path / "x.tar", tar_sample(4, cls=raw, json=None))))
    assert image.label == label


@pytest.mark.parametrize(
    "raw",
    [
        b"1_0",
        b"+1",
        b"",
        b" ",
        b"1.0",
        b"1e1",
        b"0x1",
        b"1 2",
        b"1\0",
        "١".encode(),
        "１".encode(),
        b"\x1c1",
        b"\xa01",
        b"9" * 19,
        b"--1",
    ],
)
def test_invalid_class_ids(tmp_path: Path, raw: bytes) -> None:
    refused(
        write_tar(tmp_path / "x.tar", tar_sample(4, cls=raw)),
        "x.tar",
        "'p0004'",
        "not an integer",
        ".cls is",
    )


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (b"[" * 5000 + b"]" * 5000, "recursion"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "recursion"),
        (b'{"caption": "\\ud800"}', "surrogates not allowed"),
        (b'{"class_name": "\\udfff"}', "surrogates not allowed"),
        (b'{"caption": 5}', "caption in .json is 5, no text"),
        (b'{"caption": ["a"]}', "caption in .json is ['a'], no text"),
        (b'{"class_name": {}}', "class_name in .json is {}, no text"),
        (b'{"caption": "a", "caption": "b"}', "caption is in .json twice"),
        (b'{"class_name": "a\\nb"}', "has control characters"),
        (b'{"class_name": "\\u001b[2J"}', "has control characters"),
        (b'{"class_name": "' + b"x" * 2000 + b'"}', "is too long"),
        (b'{"x": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"\xff{}", "not an integer, JSON"),
    ],
    ids=range(13),
)
def test_hostile_json(tmp_path: Path, raw: bytes, fragment: str) -> None:
    refused(
        write_tar(tmp_path / "x.tar", tar_sample(0) + tar_sample(4, json=raw, txt=None)),
        "x.tar",
        "'p0004'",
        fragment,
    )


@pytest.mark.parametrize(
    "raw",
    [b'{"caption": NaN, "class_name": null}', b"[]", b"3", b'{"caption": null, "similarity": NaN}'],
)
def test_json_without_a_caption(tmp_path: Path, raw: bytes) -> None:
    (image,) = list_images(str(write_tar(tmp_path / "x.tar", tar_sample(4, json=raw, txt=None))))
    assert image.caption is None and image.class_name is None


@pytest.mark.parametrize(
    ("extension", "size"), [("cls", 65), ("txt", (1 << 20) + 1), ("json", (16 << 20) + 1)]
)
def test_members_that_are_too_large(tmp_path: Path, extension: str, size: int) -> None:
    refused(
        write_tar(tmp_path / "x.tar", tar_sample(4, **{extension: b"1" * size})),
        "'p0004'",
        f"its .{extension} has {size} bytes",
    )


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


def with_size(block: bytes, size: bytes) -> bytes:
    """The header with another size and a valid checksum."""
    raw = bytearray(block)
    raw[124:136] = size
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) * 3000 + END,
            id="chain of long names",
        ),
        pytest.param(header("x", 20, tarfile.XHDTYPE) * 3000 + END, id="chain of pax headers"),
        pytest.param(header("x", 1 << 33, tarfile.XHDTYPE) + END, id="huge pax header"),
        pytest.param(
            header("././@LongLink", 1 << 33, tarfile.GNUTYPE_LONGNAME) + END, id="huge long name"
        ),
        pytest.param(
            header("x", 512, tarfile.XHDTYPE)
            + b"99999 path=x\n".ljust(512, b"\0")
            + header("a.png", 0)
            + END,
            id="pax length",
        ),
        pytest.param(
            header("x", 512, tarfile.XHDTYPE)
            + b"13 size=-512\n".ljust(512, b"\0")
            + header("a.png", 0)
            + END,
            id="pax size",
        ),
        pytest.param(
            with_size(header("a.png", 0), b"\xff" * 11 + b"\x00") + END, id="negative size"
        ),
        pytest.param(
            with_size(header("a.png", 0), b"\x80" + b"\xff" * 11) + END, id="size of 88 bits"
        ),
        pytest.param(
            with_size(header("x", 0, tarfile.XHDTYPE), b"\xff" * 12) + END, id="negative pax"
        ),
        pytest.param(header("a.png", 0, tarfile.GNUTYPE_SPARSE) + END, id="sparse"),
        pytest.param(header("a.png", 0, tarfile.FIFOTYPE) + END, id="fifo"),
        pytest.param(
            header("a.png", 0, tarfile.LNKTYPE, linkname="/etc/passwd") + END, id="hard link"
        ),
        pytest.param(header("a.png", 0, tarfile.CHRTYPE) + END, id="device"),
    ],
)
def test_hostile_archives(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(raw)
    refused(tmp_path / "x.tar", f"{tmp_path}/x.tar: ")


def test_a_sparse_file_in_pax_headers(tmp_path: Path) -> None:
    """`tarfile` reports the unpacked size of a sparse file, which has fewer bytes in the tar."""
    data = encode_image(random_image(0))
    info = tarfile.TarInfo("p.png")
    info.size, info.pax_headers = (
        len(data),
        {
            "GNU.sparse.map": f"0,{len(data)}",
            "GNU.sparse.size": str(len(data)),
            "GNU.sparse.name": "p.png",
        },
    )
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    refused(tmp_path / "x.tar", "x.tar: member 'p.png' is a link, a device or sparse")


def test_concatenated_archives(tmp_path: Path) -> None:
    """Members after the first end mark would be lost silently."""
    both = (
        write_tar(tmp_path / "a.tar", tar_sample(0)).read_bytes()
        + write_tar(tmp_path / "b.tar", tar_sample(1)).read_bytes()
    )
    (tmp_path / "x.tar").write_bytes(both)
    refused(tmp_path / "x.tar", "x.tar: its end mark is at byte", "pack them again as one")
    whole = write_tar(tmp_path / "y.tar", tar_sample(0))
    whole.write_bytes(whole.read_bytes() + bytes(1 << 21))
    assert keys(whole) == ["p0000"]


@pytest.mark.parametrize(
    "name", ["a\x00b.png", "a\x1b[2J.png", "a\x85.png", "\udcff.png", "x" * 5000 + ".png"]
)
def test_unprintable_names(tmp_path: Path, name: str) -> None:
    with tarfile.open(
        tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT if "\0" in name else tarfile.GNU_FORMAT
    ) as tar:
        info = tarfile.TarInfo("p.png" if "\0" in name else name)
        info.pax_headers = {"path": name} if "\0" in name else {}
        tar.addfile(info, io.BytesIO())
    with pytest.raises(DataError) as error:
        list(list_images(str(tmp_path / "x.tar")))
    str(error.value).encode()
    assert "x.tar: the member name" in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("folder", ["", "class"])
def test_a_folder_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "other").mkdir()
    scandir = os.scandir

    def forbidden(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == tmp_path / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    refused(tmp_path, str(tmp_path), "cannot be listed", "Permission denied")
