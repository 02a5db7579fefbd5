"""Random tars, members and images: a bad entry is listed with its name, a good one equals what was
stored.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lpl_pretrain.encoding.decode_image import MAX_PIXELS, decode_image
from lpl_pretrain.encoding.resize_crop import plan_resize_crop, resize_and_crop
from lpl_pretrain.encoding.source_image import BadImage, SourceImage
from lpl_pretrain.encoding.sources import list_units
from lpl_pretrain.encoding.tars import parse_class_id
from lpl_pretrain.errors import DataError, LPLError
from tests.support.fuzz import cases
from tests.support.image_tars import encode_image, random_image
from tests.unit.encoding.test_colour import PIXELS, SWAPPED, rgb_profile

PNG = encode_image(random_image(0))
GREY16 = PIXELS["grey16, transparent value"][0]
WITH_PROFILE = encode_image(random_image(1), icc_profile=rgb_profile(SWAPPED, 2.2))
DEEP = b"[" * 5000 + b"]" * 5000


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars") / "x.tar"


def items_of(tar: Path) -> list[SourceImage | BadImage]:
    """All entries of a tar; decodes the images, checks that bad entries are named."""
    (unit,) = list_units(str(tar))
    items = list(unit.images())
    for item in items:
        if isinstance(item, BadImage):
            assert str(tar) in item.reason and len(item.reason) < 2000
            item.reason.encode()
            continue
        assert not item.key.startswith("/") and ".." not in item.key.split("/")
        (item.key + (item.class_name or "") + (item.caption or "")).encode()
        json.dumps(item.fingerprint())
        try:
            pixels = item.load()
        except DataError as error:
            assert item.origin in str(error) and len(str(error)) < 2000
        else:
            assert (
                pixels.ndim == 3
                and pixels.shape[2] == 3
                and pixels.dtype == np.uint8
                and pixels.size
            )
    return items


CLASS_IDS = st.one_of(
    st.integers(-3, 200).map(lambda value: str(value).encode()),
    st.text("0123456789-+_ .e\n\t١１", max_size=8).map(str.encode),
    st.binary(max_size=6),
)
WORDS = st.text(max_size=12)
JSONS = st.one_of(
    st.dictionaries(
        st.sampled_from(["caption", "class_name", "x"]),
        st.one_of(WORDS, st.none(), st.integers(), st.floats()),
        max_size=3,
    ).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20),
    st.sampled_from([b"", b"{", b"[]", DEEP, b'{"caption": "\\ud800"}', b'{"a":' * 3000]),
)
NUM_IMAGES = st.sampled_from(
    [PNG, GREY16, WITH_PROFILE, b"", b"\x89PNG\r\n\x1a\n", encode_image(random_image(2), "JPEG")]
)
NAMES = st.one_of(
    st.sampled_from(
        ["a", "b", "d/c", "../x", "/etc/x", "a\\b", "é", "c.d", ".h", "\udcff", "x" * 120]
    ),
    st.text(max_size=6),
)
KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 8
    + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"V", b"9"]
)
MEMBERS = st.tuples(
    NAMES,
    st.one_of(
        st.tuples(st.just("png"), NUM_IMAGES),
        st.tuples(st.sampled_from(["jpg", "PNG", "png.png", "mp4"]), NUM_IMAGES),
        st.tuples(st.just("cls"), CLASS_IDS),
        st.tuples(
            st.just("txt"),
            WORDS.map(lambda text: text.encode(errors="replace")) | st.binary(max_size=8),
        ),
        st.tuples(st.just("json"), JSONS),
    ),
    KINDS,
)


def write(path: Path, members: list, form: int) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, (extension, data), kind in members:
            info = tarfile.TarInfo(f"{name}.{extension}")
            info.size, info.type = len(data) if kind == tarfile.REGTYPE else 0, kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "/etc/passwd"
            tar.addfile(info, io.BytesIO(data) if info.size else None)


@cases(120)
@given(
    members=st.lists(MEMBERS, max_size=8),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@example(
    members=[("a", ("png", PNG), tarfile.REGTYPE), ("a", ("json", DEEP), tarfile.REGTYPE)],
    form=tarfile.GNU_FORMAT,
)
@example(
    members=[("a", ("png", PNG), tarfile.REGTYPE), ("a", ("cls", b"1_0"), tarfile.REGTYPE)],
    form=tarfile.GNU_FORMAT,
)
@example(members=[("a", ("png", GREY16), tarfile.REGTYPE)], form=tarfile.GNU_FORMAT)
@example(members=[("a", ("png", WITH_PROFILE), tarfile.REGTYPE)], form=tarfile.GNU_FORMAT)
def test_tars(tar: Path, members: list, form: int) -> None:
    write(tar, members, form)
    stored: dict[str, dict[str, bytes]] = {}
    for name, (extension, data), kind in members:
        if kind == tarfile.REGTYPE:
            stored.setdefault(name.removeprefix("./"), {}).setdefault(extension, data)
    for item in items_of(tar):
        if (
            isinstance(item, SourceImage)
            and item.key in stored
            and len([name for name, *_ in members if name == item.key]) <= 4
        ):
            said = stored[item.key]
            if item.label is not None and "cls" in said:
                assert re.fullmatch(
                    r"-?[0-9]+", said["cls"].decode().strip()
                ) and item.label == int(said["cls"])
            if item.caption is not None and "json" not in said:
                assert item.caption.encode() == said["txt"]


@cases(60)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=16)), min_size=1, max_size=4
    ),
    cut=st.integers(0, 4000),
    headers=st.booleans(),
)
def test_tars_with_other_bytes(
    tar: Path, edits: list[tuple[int, bytes]], cut: int, headers: bool
) -> None:
    """`headers`: changed headers get a valid checksum."""
    members = [
        (name, part, tarfile.REGTYPE)
        for name in "ab"
        for part in (("png", PNG), ("cls", b"1"), ("txt", b"a cat"))
    ]
    write(tar, members, tarfile.GNU_FORMAT)
    raw = bytearray(tar.read_bytes())
    with tarfile.open(tar) as whole:
        starts = [info.offset for info in whole]
    for position, data in edits:
        at = (
            starts[position % len(starts)] + position // 7 % 500 if headers else position % len(raw)
        )
        raw[at : at + len(data)] = data[: len(raw) - at]
    for start in starts if headers else []:
        raw[start + 148 : start + 156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    tar.write_bytes(raw[: len(raw) - cut])
    items_of(tar)


@cases(60)
@given(raw=CLASS_IDS)
@example(raw=b"1_0")
@example(raw="١".encode())
@example(raw=b"+1")
@example(raw=b" 1 ")
@example(raw=b"1\n")
def test_class_ids(raw: bytes) -> None:
    try:
        value = parse_class_id(raw)
    except ValueError:
        return
    text = raw.decode("ascii").strip(" \t\r\n")
    assert set(text) <= set("-0123456789") and value == int(text) and text.count("-") <= 1


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]


@cases(90)
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    profile=st.sampled_from([None, b"junk", rgb_profile(SWAPPED, 1.8)]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), max_size=2),
    cut=st.integers(0, 30),
)
def test_images(
    mode: str, kind: str, size: tuple[int, int], profile: bytes | None, edits: list, cut: int
) -> None:
    image = Image.fromarray(random_image(3, *size)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    options = {} if profile is None else {"icc_profile": profile}
    try:
        raw = bytearray(encode_image(image, kind, **options))
    except (OSError, KeyError):  # this kind of file has no such mode
        return
    for position, data in edits:
        at = position % len(raw)
        raw[at : at + len(data)] = data[: len(raw) - at]
    is_whole = not edits and not cut
    try:
        pixels = decode_image(bytes(raw[: len(raw) - cut]), "here.png")
    except LPLError as error:
        assert not is_whole and str(error).startswith("here.png: ") and len(str(error)) < 1000
        return
    assert (
        pixels.dtype == np.uint8
        and pixels.shape[2:] == (3,)
        and pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
    )
    if is_whole:
        assert pixels.shape[:2] == size
    fitted = resize_and_crop(pixels, plan_resize_crop(pixels.shape[:2], (16, 24)))
    assert fitted.shape == (16, 24, 3)
