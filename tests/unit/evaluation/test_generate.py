"""Image i depends on (seed, i) alone; classes follow training; one rounding rule."""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.config.protocol import SamplerConfig
from lpl_pretrain.errors import NonFiniteError
from lpl_pretrain.evaluation.generate import draw_classes, to_uint8
from lpl_pretrain.evaluation.trained_run import open_run

CLOSE = {"rtol": 0, "atol": 1e-5}
WAY = {"seed": 3, "sampler": SamplerConfig(kind="euler", steps=3), "guidance_scale": 2.0}


@pytest.fixture
def generator(run):
    trained = open_run(run.run_dir, torch.device("cpu"))
    trained.load(6, "ema")
    return trained.generator


def test_images_do_not_depend_on_the_batch(generator):
    together = generator.images(range(6), **WAY)
    alone = torch.cat([generator.images([i], **WAY) for i in range(6)])
    scattered = generator.images([4, 0], **WAY)
    torch.testing.assert_close(alone, together, **CLOSE)
    torch.testing.assert_close(scattered, together[[4, 0]], **CLOSE)
    assert together.shape == (6, 3, 32, 32)


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"guidance_scale": 1.0}, {"sampler": SamplerConfig(kind="heun", steps=3)}],
)
def test_has_teeth(generator, change):
    """Another seed, scale or sampler gives other images: the test above compares no constants."""
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            generator.images(range(2), **{**WAY, **change}),
            generator.images(range(2), **WAY),
            **CLOSE,
        )


def test_noise_keyed_by_position_in_the_batch_is_noticed(generator, monkeypatch):
    from lpl_pretrain.runtime import rng

    honest = rng.normal
    monkeypatch.setattr(
        rng,
        "normal",
        lambda seed, purpose, ids, shape: honest(seed, purpose, range(len(ids)), shape),
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            generator.images([4], **WAY), generator.images(range(6), **WAY)[[4]], **CLOSE
        )


def test_bf16_is_close_and_not_equal(generator):
    exact, rough = (
        generator.images(range(4), **WAY),
        generator.images(range(4), precision="bf16", **WAY),
    )
    assert 0 < (exact - rough).abs().max() < 0.1 and rough.dtype == torch.float32


def test_pixels_come_in_order(generator):
    batches = [generator.pixels(batch, **WAY) for batch in (range(2), range(2, 4), range(4, 5))]
    assert [len(batch) for batch in batches] == [2, 2, 1] and batches[0].dtype == torch.uint8
    whole = to_uint8(generator.images(range(5), **WAY)).int()
    assert (torch.cat(batches).int() - whole).abs().max() <= 1


def test_classes_follow_training_frequencies():
    drawn = draw_classes(0, range(4000), [10, 0, 30])
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.0, 0.75]), rtol=0, atol=0.03)
    assert torch.equal(draw_classes(0, [17, 5], [10, 0, 30]), drawn[[17, 5]])
    assert not torch.equal(draw_classes(1, range(4000), [10, 0, 30]), drawn)


def test_without_classes_everything_is_the_null_class():
    assert draw_classes(0, range(3), []).tolist() == [0, 0, 0]


def test_the_rounding_rule():
    images = torch.tensor(
        [-2.0, -1.0, 1 / 127.5 * 0.4 - 1, 1 / 127.5 * 0.6 - 1, 0.0, 1.0, 7.0]
    ).view(1, 1, 1, 7)
    assert to_uint8(images).flatten().tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_a_non_finite_image_is_named():
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"\[65\]"):
        to_uint8(images, first=64)
