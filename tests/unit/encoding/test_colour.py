"""Colour profiles and transparency: pixels compared with colours that the tests compute from the
definitions.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lpl_pretrain.encoding import colour
from lpl_pretrain.encoding.decode_image import decode_image
from lpl_pretrain.errors import DataError
from tests.support.image_tars import encode_image, random_image

D50 = np.array([0.9642, 1.0, 0.8249])
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
"""Linear sRGB -> XYZ at D50, as its ICC profile says (IEC 61966-2-1, adapted by Bradford)."""
WIDE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
"""Adobe RGB (1998)."""


def number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(
    space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr"
) -> bytes:
    """An ICC profile, version 2, byte by byte (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + b"".join(map(number, D50)),
        **tags,
    }
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        content += bytes(-len(content) % 4)
        table += signature + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = (
        struct.pack(">I4sI4s4s4s", 0, b"none", 0x02400000, kind, space, pcs) + bytes(12) + b"acsp"
    )
    header = header.ljust(68, b"\0") + b"".join(map(number, D50))
    whole = header.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(matrix: np.ndarray, gamma: float) -> bytes:
    columns = {
        b"rgb"[i : i + 1] + b"XYZ": b"XYZ " + bytes(4) + b"".join(map(number, matrix[:, i]))
        for i in range(3)
    }
    return profile(
        b"RGB ", columns | {name + b"TRC": gamma_curve(gamma) for name in (b"r", b"g", b"b")}
    )


def to_levels(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB, clipped -> 0 to 255."""
    linear = np.clip(linear, 0, 1)
    encode_image = np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )
    return np.rint(encode_image * 255).astype(int)


def expected(pixels: np.ndarray, matrix: np.ndarray, gamma: float) -> np.ndarray:
    return to_levels((pixels / 255.0) ** gamma @ matrix.T @ np.linalg.inv(SRGB).T)


SWAPPED = SRGB[:, [1, 0, 2]]
PROFILES = [(WIDE, 2.19921875), (SWAPPED, 2.19921875), (SRGB, 1.0), (SRGB, 1.8), (SWAPPED, 3.0)]


@pytest.mark.parametrize(
    ("matrix", "gamma"), PROFILES, ids=["adobe", "swapped", "linear", "gamma1.8", "swapped3"]
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_profiles_are_converted(matrix: np.ndarray, gamma: float, kind: str) -> None:
    pixels, options = random_image(0, 24, 24), {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(
        encode_image(pixels, kind, icc_profile=rgb_profile(matrix, gamma), **options), "x.png"
    )
    wanted = expected(pixels, matrix, gamma)
    assert (
        np.abs(decoded.astype(int) - wanted).max() <= 3
        and np.abs(wanted - pixels.astype(int)).max() > 15
    )


def test_has_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the conversion the same comparison fails."""
    monkeypatch.setattr(colour, "_transform", lambda profile, mode: (None, None))
    pixels = random_image(0, 24, 24)
    decoded = decode_image(encode_image(pixels, icc_profile=rgb_profile(WIDE, 2.19921875)), "x.png")
    assert np.abs(decoded.astype(int) - expected(pixels, WIDE, 2.19921875)).max() > 20


def test_a_profile_equal_to_srgb_changes_nothing() -> None:
    pixels = random_image(0, 64, 64)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_image(encode_image(pixels, icc_profile=own), "x.png"), pixels)


def test_jpeg_palette_and_alpha_have_profiles_too() -> None:
    raw = rgb_profile(SWAPPED, 1.0)
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    wanted = expected(flat, SWAPPED, 1.0)[0, 0]
    for image, kind in (
        (Image.fromarray(flat), "JPEG"),
        (Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        (Image.fromarray(flat).convert("RGBA"), "PNG"),
    ):
        decoded = decode_image(encode_image(image, kind, icc_profile=raw), "x")
        assert np.abs(decoded[0, 0].astype(int) - wanted).max() <= 4, kind
    half = Image.fromarray(np.concatenate([flat, np.full((16, 16, 1), 128, np.uint8)], axis=2))
    decoded = decode_image(encode_image(half, icc_profile=raw), "x.png")
    assert np.abs(decoded[0, 0] - (wanted * 128 + 255 * 127) / 255).max() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_profiles(mode: str) -> None:
    """Linear grey: 128 is half of the light, 188 in sRGB."""
    linear = profile(b"GRAY", {b"kTRC": gamma_curve(1.0)})
    levels = np.full((8, 8), 128, np.uint8)
    image = Image.fromarray(levels)
    if mode == "I;16":
        image = Image.fromarray(levels.astype(np.uint16) * 257)
    elif mode == "1":
        image = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    elif mode == "LA":
        image.putalpha(255)
    decoded = decode_image(encode_image(image, icc_profile=linear), "x.png")
    wanted = np.repeat(
        to_levels(np.eye(8) if mode == "1" else levels / 255.0)[..., None], 3, axis=2
    )
    assert np.abs(decoded.astype(int) - wanted).max() <= 1 and wanted.max() >= 188


def cmyk_profile() -> bytes:
    """Profile of inks whose mixtures have lightness 100 - 70 K - 10 (C + M + Y) and no colour, as a
    table of two points each.
    """
    lab = [
        (100 - 70 * k - 10 * (c + m + y), 0, 0)
        for c in (0, 1)
        for m in (0, 1)
        for y in (0, 1)
        for k in (0, 1)
    ]
    table = b"".join(bytes([round(lightness * 2.55), 128, 128]) for lightness, _, _ in lab)
    ramp = bytes(range(256))
    identity = b"".join(number(value) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    return profile(b"CMYK", {b"A2B0": lut}, b"Lab ", b"prtr")


def level_of_lightness(lightness: float) -> int:
    y = ((lightness + 16) / 116) ** 3 if lightness > 8 else lightness / 903.3
    return int(to_levels(np.array(y)))


@pytest.mark.parametrize(
    ("inks", "lightness"), [((0, 0, 0, 0), 100), ((0, 0, 0, 255), 30), ((255, 255, 0, 0), 80)]
)
def test_cmyk_profiles(inks: tuple[int, int, int, int], lightness: float) -> None:
    raw = encode_image(
        Image.new("CMYK", (16, 16), inks), "JPEG", quality=100, icc_profile=cmyk_profile()
    )
    assert b"Adobe" in raw
    decoded = decode_image(raw, "x.jpg")[8, 8].astype(int)
    assert np.abs(decoded - level_of_lightness(lightness)).max() <= 3


def without_adobe(jpeg: bytes) -> bytes:
    """The JPEG without its APP14 segment."""
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


def test_cmyk_with_and_without_the_mark_of_adobe() -> None:
    """Adobe stores inks inverted and marks such files; without the mark they are stored as they are
    (ITU-T T.872, 6.5.3).
    """
    marked = encode_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(decode_image(marked, "x.jpg")[0, 0].astype(int) - (255, 0, 0)).max() <= 3
    plain = without_adobe(
        encode_image(Image.new("CMYK", (8, 8), (255, 0, 0, 255)), "JPEG", quality=100)
    )
    assert b"Adobe" not in plain
    assert np.abs(decode_image(plain, "x.jpg")[0, 0].astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("raw", "mode", "fragment"),
    [
        (b"no profile", "RGB", "cannot be read"),
        (rgb_profile(WIDE, 2.2)[:200], "RGB", "cannot be read"),
        (rgb_profile(WIDE, 2.2), "L", "it is for RGB and the image is GRAY"),
        (
            profile(b"GRAY", {b"kTRC": gamma_curve(1.0)}),
            "RGB",
            "it is for GRAY and the image is RGB",
        ),
        (rgb_profile(WIDE, 2.2)[:-40] + b"\xff" * 40, "RGB", None),
    ],
    ids=["none", "cut", "grey", "rgb", "bent"],
)
def test_an_unusable_profile_is_ignored_and_named(
    raw, mode, fragment, caplog: pytest.LogCaptureFixture
) -> None:
    colour._warned.clear()
    image = Image.fromarray(random_image(0)).convert(mode)
    with caplog.at_level("WARNING", logger="lpl_pretrain"):
        decoded = [
            decode_image(encode_image(image, icc_profile=raw), f"x{i}.png") for i in range(2)
        ]
    if fragment is None:
        return  # any colours, no traceback
    assert np.array_equal(decoded[0], np.asarray(image.convert("RGB"))) and np.array_equal(*decoded)
    assert (
        caplog.text.count("x0.png: its colour profile is ignored") == 1
        and "x1.png" not in caplog.text
    )
    assert fragment in caplog.text


# --- transparency, PNG by PNG, compared with known pixels


def png(
    width: int, height: int, bits: int, kind: int, rows: list[bytes], *more: tuple[bytes, bytes]
) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(*one) for one in more)
        + data
        + chunk(b"IEND", b"")
    )


GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
PIXELS = {
    "grey16, transparent value": (
        png(
            3, 1, 16, GREY, [struct.pack(">3H", 0, 1000, 65535)], (b"tRNS", struct.pack(">H", 1000))
        ),
        [0, 255, 255],
    ),
    "grey16, a value near it is not": (
        png(
            2, 1, 16, GREY, [struct.pack(">2H", 32896, 32897)], (b"tRNS", struct.pack(">H", 32896))
        ),
        [255, 128],
    ),
    "grey16 without": (png(2, 1, 16, GREY, [struct.pack(">2H", 32896, 0)]), [128, 0]),
    "grey8": (png(3, 1, 8, GREY, [bytes([0, 7, 255])], (b"tRNS", b"\0\7")), [0, 255, 255]),
    "grey4": (png(4, 1, 4, GREY, [bytes([0x03, 0xF1])], (b"tRNS", b"\0\3")), [0, 255, 255, 17]),
    "grey2": (png(4, 1, 2, GREY, [bytes([0b00011011])], (b"tRNS", b"\0\1")), [0, 255, 170, 255]),
    "grey1": (png(4, 1, 1, GREY, [bytes([0b01010000])], (b"tRNS", b"\0\0")), [255, 255, 255, 255]),
    "grey1 white": (
        png(4, 1, 1, GREY, [bytes([0b01010000])], (b"tRNS", b"\0\1")),
        [0, 255, 0, 255],
    ),
    "rgb8": (
        png(2, 1, 8, RGB, [bytes([9, 8, 7, 9, 8, 6])], (b"tRNS", b"\0\x09\0\x08\0\x07")),
        [(255,) * 3, (9, 8, 6)],
    ),
    "palette, bytes": (
        png(
            3,
            1,
            8,
            PALETTE,
            [bytes([0, 1, 2])],
            (b"PLTE", bytes([9, 8, 7, 0, 0, 0, 5, 5, 5])),
            (b"tRNS", bytes([0, 51])),
        ),
        [(255,) * 3, (204,) * 3, (5,) * 3],
    ),
    "palette, one entry": (
        png(
            2,
            1,
            8,
            PALETTE,
            [bytes([0, 1])],
            (b"PLTE", bytes([9, 8, 7, 1, 2, 3])),
            (b"tRNS", bytes([255, 0])),
        ),
        [(9, 8, 7), (255,) * 3],
    ),
    "grey and alpha": (png(2, 1, 8, GREY_ALPHA, [bytes([0, 51, 7, 255])]), [204, 7]),
    "grey and alpha, 16 bits": (png(1, 1, 16, GREY_ALPHA, [struct.pack(">2H", 0, 0)]), [255]),
    "rgba, 16 bits": (png(1, 1, 16, RGBA, [struct.pack(">4H", 65535, 0, 0, 65535)]), [(255, 0, 0)]),
    "rgb, 16 bits": (png(1, 1, 16, RGB, [struct.pack(">3H", 65535, 0, 32896)]), [(255, 0, 128)]),
}


@pytest.mark.parametrize("name", PIXELS)
def test_every_kind_of_transparency(name: str) -> None:
    raw, wanted = PIXELS[name]
    decoded = decode_image(raw, "x.png")
    assert decoded[0].tolist() == [
        list(value) if isinstance(value, tuple) else [value] * 3 for value in wanted
    ]


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    """Pillow keeps 8 of the bits, which do not identify the transparent pixels."""
    raw = png(1, 1, 16, RGB, [bytes(6)], (b"tRNS", bytes(6)))
    with pytest.raises(
        DataError, match="x.png: not a readable image .a transparent colour of 16 bits a channel"
    ):
        decode_image(raw, "x.png")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), value) for value in ("red", "blue")]
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert (decode_image(buffer.getvalue(), "x") == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="x.png: not a readable image"):
        decode_image(png(*size, 8, GREY, [b""] * size[1]), "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_or_complete(kind: str) -> None:
    """A partial image is never returned."""
    raw = encode_image(random_image(0, 40, 40), kind)
    whole = decode_image(raw, "x")
    for length in range(0, len(raw), 37):
        try:
            assert np.array_equal(decode_image(raw[:length], "x"), whole)
        except DataError as error:
            assert str(error).startswith("x: ")
