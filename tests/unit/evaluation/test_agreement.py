"""The same features and scores as torch-fidelity and pytorch-fid from one weights file; clean-fid's
resize; timm; CLIP.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch_fidelity.feature_extractor_inceptionv3 as theirs
import transformers
from PIL import Image
from pytorch_fid import inception as pytorch_fid
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity
from torch_fidelity import metric_fid, metric_isc

from lpl_pretrain.config import metrics
from lpl_pretrain.config.metrics import record_name
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.clip_score import clip_score
from lpl_pretrain.evaluation.extractor import resize_bicubic
from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.inception_score import inception_score
from lpl_pretrain.evaluation.registry import load_extractor
from lpl_pretrain.evaluation.stats import FeatureStatistics
from tests.support.text_encoders import tokenizer

CPU = torch.device("cpu")


def pictures(count, side=64, seed=0):
    """Smooth images, so that features differ more between images than noise does."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1) * 255
    ).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, inception_layout):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_layout, path)
    return path


@pytest.fixture(scope="module")
def features(weights):
    """(ours, torch-fidelity's) of the same 24 images of 64 px."""
    network = theirs.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    images = pictures(24)
    with torch.no_grad():
        pooled, logits = network.eval()(images)
    ours = load_extractor(ExtractorConfig(kind="inception", weights=str(weights)), CPU)(images)
    return ours, {"pooled": pooled, "logits": logits}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_features_equal_torch_fidelitys(features):
    ours, wanted = features
    assert (
        relative(ours["pooled"], wanted["pooled"]) < 1e-5
        and relative(ours["logits"], wanted["logits"]) < 1e-5
    )
    assert relative(ours["pooled"][1:], wanted["pooled"][:-1]) > 1e-3, (
        "pictures differ by more than the tolerance"
    )


def test_features_equal_pytorch_fids(weights, inception_layout, monkeypatch):
    """Trunks are compared on one input: pytorch-fid resizes and scales unlike TensorFlow."""
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: inception_layout)
    network = pytorch_fid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    trunk = load_extractor(
        ExtractorConfig(kind="inception", weights=str(weights)), CPU
    ).network.trunk
    x = torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(trunk(x), network(x)[0].flatten(1)) < 1e-5


def test_scores_equal_torch_fidelitys(features):
    """Scores are computed from features that each tool extracted itself."""
    ours, wanted = features
    halves = [slice(0, 12), slice(12, 24)]
    mine, real = (FeatureStatistics(2048) for _ in halves)
    for statistics, half in zip((mine, real), halves, strict=True):
        statistics.update(ours["pooled"][half])
    theirs_of = [metric_fid.fid_features_to_statistics(wanted["pooled"][half]) for half in halves]
    fid = metric_fid.fid_statistics_to_metric(*theirs_of, verbose=False)[
        "frechet_inception_distance"
    ]
    assert frechet_distance(mine, real) == pytest.approx(fid, rel=1e-4)
    isc = metric_isc.isc_features_to_metric(wanted["logits"], splits=2, shuffle=False)
    mean, std = inception_score(ours["logits"], splits=2, seed=None)
    assert mean == pytest.approx(isc["inception_score_mean"], rel=1e-4)
    assert std == pytest.approx(isc["inception_score_std"], rel=1e-3)


def test_has_teeth_another_resize(weights):
    """Half-pixel bilinear instead of TensorFlow's is noticed at once."""
    extractor, images = (
        load_extractor(ExtractorConfig(kind="inception", weights=str(weights)), CPU),
        pictures(2),
    )
    half_pixel = torch.nn.functional.interpolate(
        images.float(), size=(299, 299), mode="bilinear", align_corners=False
    )
    with torch.no_grad():
        other = extractor.network.trunk((half_pixel - 128) / 128)
    assert relative(other, extractor(images)["pooled"]) > 1e-3


@pytest.mark.parametrize(("size", "side"), [((64, 64), 24), ((40, 56), 24), ((20, 20), 33)])
def test_the_resize_is_pillows(size, side):
    """Bicubic with antialiasing, channel by channel in float32, as clean-fid does it."""
    image = torch.randint(
        0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    channels = [
        Image.fromarray(channel.numpy().astype(np.float32), mode="F") for channel in image[0]
    ]
    wanted = np.stack(
        [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    )
    assert np.abs(resize_bicubic(image, side)[0].numpy() - wanted).max() < 1e-2
    assert (
        np.abs(
            torch.nn.functional.interpolate(image.float(), size=(side, side), mode="bicubic")[
                0
            ].numpy()
            - wanted
        ).max()
        > 1
    )


def test_networks_of_timm(tmp_path):
    """Features are those before the classifier (as in FD-DINOv2); a file of other shapes fails."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    config = {"kind": "timm", "network": "vit_tiny_patch16_224", "side_px": 32, "name": "vit"}
    extractor = load_extractor(
        ExtractorConfig(**config, weights=str(tmp_path / "vit.safetensors")), CPU
    )
    images = pictures(3, 48)
    mean, std = (torch.tensor(network.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = network((resize_bicubic(images, 32) / 255 - mean) / std)
    torch.testing.assert_close(extractor(images)["pooled"], wanted)
    assert (
        extractor.dimension == 192
        and record_name(metrics.FD.scores[0], extractor.suffix) == "fd_vit"
        and record_name(metrics.KID.scores[0], extractor.suffix) == "kid_vit"
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(
        ConfigError, match="extractors.vit.weights=.*not timm's vit_tiny_patch16_224"
    ):
        load_extractor(ExtractorConfig(**config, weights=str(tmp_path / "no.safetensors")), CPU)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": 14,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {"max_position_embeddings": 9, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_clip_equals_its_own_library(clip_folder, tmp_path):
    """Images through transformers' own processor, captions through its tokenizer."""
    extractor = load_extractor(ExtractorConfig(kind="clip", weights=str(clip_folder)), CPU)
    images, captions = pictures(3, 48), ["a cat", "a red dog and a cat", ""]
    network = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    prepared = processor(
        images=[Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images], return_tensors="pt"
    )
    tokens = tokenizer()(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        both = network(
            pixel_values=prepared["pixel_values"],
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
    mine, text = extractor(images)["pooled"], extractor.embed_text(captions)
    assert cosine_similarity(mine, both.image_embeds).min() > 0.9999, (
        "the processor rounds to whole pixel values between"
    )
    torch.testing.assert_close(
        torch.nn.functional.normalize(text, dim=1), both.text_embeds, rtol=1e-4, atol=1e-5
    )
    wanted = 100 * cosine_similarity(mine, text).clamp(min=0).double().mean().item()
    assert clip_score(mine, text) == pytest.approx(wanted, rel=1e-5)
    assert clip_score(mine, -text) != pytest.approx(wanted, rel=1e-2)
    assert record_name(metrics.CMMD.scores[0], extractor.suffix) == "cmmd"
    with pytest.raises(ConfigError, match="extractors.clip.weights=.*transformers cannot load it"):
        load_extractor(ExtractorConfig(kind="clip", weights=str(tmp_path)), CPU)
