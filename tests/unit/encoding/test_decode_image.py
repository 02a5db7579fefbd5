"""Decoding, resizing, cropping and aspect-ratio buckets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lpl_pretrain.encoding.decode_image import decode_image
from lpl_pretrain.encoding.resize_crop import (
    aspect_buckets,
    nearest_bucket,
    plan_resize_crop,
    resize_and_crop,
    to_square,
)
from tests.support.image_tars import encode_image, random_image


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (
            Image.new("RGB", (2, 2), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE),
            (1, 2, 3),
        ),
        (Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16)), (128, 128, 128)),
    ],
)
def test_modes(pixels: Image.Image, wanted: tuple[int, int, int]) -> None:
    assert decode_image(encode_image(pixels), "x.png").tolist() == [[list(wanted)] * 2] * 2


def test_transparent_palette_is_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([9, 9, 9, 8, 8, 8])
    assert (decode_image(encode_image(image, transparency=0), "x.png") == 255).all()


def test_cmyk() -> None:
    pixels = decode_image(
        encode_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), "x.jpg"
    )
    assert np.abs(pixels[0, 0].astype(int) - (255, 0, 0)).max() <= 3


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[:, :2] = 255
    shown = decode_image(encode_image(pixels, exif=exif), "x.png")
    assert shown.shape == (4, 2, 3) and (shown[:2] == 255).all() and (shown[2:] == 0).all()


def test_square_keeps_pixels_of_the_right_size() -> None:
    assert np.array_equal(to_square(random_image(0, 16, 16), 16), random_image(0, 16, 16))
    assert np.array_equal(to_square(random_image(0, 16, 21), 16), random_image(0, 16, 21)[:, 2:18])


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (81, 64), (9, 13)])
def test_square_equals_resize_then_crop(size: tuple[int, int]) -> None:
    yy, xx = np.mgrid[: size[0], : size[1]]
    smooth = np.stack([yy * 3, xx * 3, (yy + xx)], axis=-1).clip(0, 255).astype(np.uint8)
    scale = 16 / min(size)
    whole = np.asarray(
        Image.fromarray(smooth).resize(
            (round(size[1] * scale), round(size[0] * scale)), Image.Resampling.LANCZOS
        )
    )
    top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 16) // 2
    assert (
        np.abs(to_square(smooth, 16).astype(int) - whole[top : top + 16, left : left + 16]).max()
        <= 7
    )


def test_square_antialiases() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_square(stripes, 16)[:, 2:-2].astype(int) - 127).max() <= 2


def test_resize_covers_the_shape_and_records_the_crop() -> None:
    fit = plan_resize_crop((100, 200), (32, 48))
    assert (fit.resized_px, fit.crop_px, fit.shape_px) == ((32, 64), (0, 8), (32, 48))
    assert plan_resize_crop((32, 48), (32, 48)).resized_px == (32, 48)
    for crop_fraction, left in (((0.0, 0.0), 0), ((0.0, 0.999999), 16), ((0.5, 0.5), 8)):
        assert plan_resize_crop((100, 200), (32, 48), crop_fraction).crop_px == (0, left)


def test_every_crop_is_a_part_of_the_whole_resized_image() -> None:
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[:60, :90], 128), axis=-1).astype(np.uint8)
    whole = np.asarray(Image.fromarray(smooth).resize((30, 20), Image.Resampling.LANCZOS)).astype(
        int
    )
    for column in (0.0, 0.3, 0.7, 0.99):
        fit = plan_resize_crop((60, 90), (20, 20), (0.0, column))
        top, left = fit.crop_px
        assert (
            np.abs(resize_and_crop(smooth, fit) - whole[top : top + 20, left : left + 20]).max()
            <= 2
        )


def test_aspect_buckets() -> None:
    buckets = aspect_buckets(256, 2.0, 64)
    assert buckets == [(192, 320), (256, 256), (320, 192)]
    assert all(h * w <= 256 * 256 and h % 64 == w % 64 == 0 for h, w in buckets)
    assert (512, 128) in aspect_buckets(256, 4.0, 64) and aspect_buckets(64, 1.0, 64) == [(64, 64)]


@pytest.mark.parametrize(
    ("source", "bucket"),
    [
        ((100, 100), (256, 256)),
        ((1000, 2000), (192, 320)),
        ((300, 200), (320, 192)),
        ((10, 11), (256, 256)),
        ((9, 1), (320, 192)),
    ],
)
def test_nearest_bucket(source: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(source, aspect_buckets(256, 2.0, 64)) == bucket
