"""Encoding: the folder it makes, when it leaves one alone, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from lpl_pretrain.cli import encode as command
from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.schema import EncodeConfig
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.encoding.writer import LatentStatistics
from lpl_pretrain.errors import ConfigError, DataError
from tests.support.material import (
    CLASSES,
    FakeAutoencoder,
    encode_config,
    encode_tar,
    encode_whole,
    encoded,
    picture,
    sample,
    tar_of,
    write_tar,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def expected_moments(number: int) -> np.ndarray:
    images = torch.from_numpy(picture(number)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return FakeAutoencoder().encode_moments(images)[0].half().numpy()


def refused(source: Path, *fragments: str) -> None:
    output = source.parent / "latents"
    with pytest.raises(DataError) as error:
        encode_whole(encode_config(source, output), FakeAutoencoder())
    for fragment in fragments:
        assert fragment in str(error.value)
    assert not (output / "index.json").exists()


def test_folder_and_index(tmp_path: Path) -> None:
    folder, index = encode_tar(tmp_path, 23, shard_samples=6)
    assert read_index(folder) == index
    files = [name for shard in index.shards for name in (shard.file, shard.file.replace(".tar", ".offsets.safetensors"))]
    assert sorted(contents(folder)) == sorted(["index.json", *files])
    assert (index.samples, index.classes, index.class_counts) == (23, list(CLASSES), [8, 8, 7])
    assert index.autoencoder.model_dump() == {"name": "fake", "identity": "fake", "downscale": 4, "shift": 0.25, "scale": 2.0}
    assert (index.latent.channels, index.latent.height, index.latent.width, index.resolution_px) == (2, 4, 4, 16)
    assert sum(shard.samples for shard in index.shards) == 23
    for shard in index.shards:
        raw = (folder / shard.file).read_bytes()
        assert len(raw) == shard.bytes and shard.samples <= 6 and hashlib.sha256(raw).hexdigest() == shard.sha256


def test_webdataset_reads_the_folder(data_set: Path) -> None:
    urls = [str(path) for path in sorted(data_set.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"p{number:04d}" for number in range(23)]
    for number, found in enumerate(samples):
        assert np.array_equal(found["moments.npy"], expected_moments(number))
        assert (found["cls"], found["txt"]) == (number % 3, f"picture {number}")
        assert found["json"] == {
            "class_name": CLASSES[number % 3],
            "source_px": [16, 16],
            "resized_px": [16, 16],
            "crop_px": [0, 0],
            "image_sha256": hashlib.sha256(encoded(picture(number))).hexdigest(),
        }


def test_statistics_are_those_of_draws_from_the_posterior(data_set: Path) -> None:
    moments = np.stack([expected_moments(number) for number in range(23)]).astype(np.float64)
    mean, std = moments[:, :2], moments[:, 2:]
    latent = read_index(data_set).latent
    np.testing.assert_allclose(latent.mean, mean.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(latent.std, np.sqrt(mean.var(axis=(0, 2, 3)) + np.square(std).mean(axis=(0, 2, 3))), rtol=1e-12)
    assert np.abs(np.array(latent.std) - mean.std(axis=(0, 2, 3))).min() > 0.1  # the posterior's own variance counts


def test_statistics_keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = LatentStatistics(1)
    for value in (1000.0, 1000.5):
        for _ in range(500):
            statistics.add(np.stack([np.full((8, 8), value), np.zeros((8, 8))]).astype(np.float16))
    mean, std = statistics.mean_and_std()
    np.testing.assert_allclose((mean[0], std[0]), (1000.25, 0.25), rtol=1e-9)


def test_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        encode_tar(tmp_path / name, 11, shard_samples=3)
    one, two = contents(tmp_path / "one" / "latents"), contents(tmp_path / "two" / "latents")
    assert one == two and len(one) > 2


def test_an_interrupted_encode_is_made_again(tmp_path: Path) -> None:
    folder, _ = encode_tar(tmp_path, 5)
    whole = contents(folder)
    (folder / "index.json").unlink()
    next(folder.glob("latents-*.tar")).write_bytes(b"half")
    (folder / ".latents-00000-0000-000-4x4.tar.123.tmp").write_bytes(b"killed here")
    encode_tar(tmp_path, 5)
    assert contents(folder) == whole


def test_a_failing_encode_leaves_no_index(tmp_path: Path) -> None:
    refused(write_tar(tmp_path / "x.tar", sample(0) + sample(1, png=b"no picture")), "x.tar:p0001.png")


def test_a_finished_folder_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, index = encode_tar(tmp_path, 5)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with caplog.at_level("INFO", logger="lpl_pretrain"):
        assert encode_tar(tmp_path, 5)[1] == index
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    assert "left alone" in caplog.text


def test_source_fingerprint_does_not_depend_on_how_pictures_are_packed(tmp_path: Path) -> None:
    _, index = encode_tar(tmp_path, 3)
    tars = [str(write_tar(tmp_path / f"{number}.tar", sample(number))) for number in (2, 0, 1)]
    apart = encode_whole(encode_config(tars, tmp_path / "apart"), FakeAutoencoder())
    assert apart.source_fingerprint == index.source_fingerprint and apart.fingerprint != index.fingerprint


class OtherAutoencoder(FakeAutoencoder):
    identity = "other"


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"autoencoder": OtherAutoencoder()}, "source or encoders have changed"),
        ({"resolution_px": 32}, "resolution_px 16 there, 32 now"),
        ({"picture": sample(1, png=encoded(picture(99)))}, "source or encoders have changed"),
        ({"picture": sample(1, cls=b"2", json=b"{}")}, "source or encoders have changed"),
        ({"picture": sample(1, txt=b"another caption")}, "source or encoders have changed"),
    ],
)
def test_a_finished_folder_of_other_inputs_is_refused(tmp_path: Path, change: dict, fragment: str) -> None:
    folder, _ = encode_tar(tmp_path, 3)
    before = contents(folder)
    tar = write_tar(tmp_path / "pictures.tar", sample(0) + change.get("picture", sample(1)) + sample(2))
    config = encode_config(tar, folder, resolution_px=change.get("resolution_px", 16))
    with pytest.raises(DataError, match=fragment) as error:
        encode(config, change.get("autoencoder", FakeAutoencoder()))
    assert str(folder) in str(error.value) and "name another output" in str(error.value)
    assert contents(folder) == before


class BrokenAutoencoder(FakeAutoencoder):
    """Sample 6 of the run gets `value` somewhere."""

    def __init__(self, value: float) -> None:
        self.value, self.seen = value, 0

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        moments = super().encode_moments(images)
        if self.seen <= 6 < self.seen + len(images):
            moments[6 - self.seen, 1, 2, 3] = self.value
        self.seen += len(images)
        return moments


@pytest.mark.parametrize(("value", "fragment"), [(np.nan, "reach nan"), (-np.inf, "reach inf"), (70000.0, "reach 70000")])
def test_moments_that_float16_cannot_hold_name_the_key(tmp_path: Path, value: float, fragment: str) -> None:
    with pytest.raises(DataError, match=f"'p0006'.*{fragment}"):
        encode_whole(encode_config(tar_of(tmp_path / "x.tar", 9), tmp_path / "latents"), BrokenAutoencoder(value))
    assert not (tmp_path / "latents" / "index.json").exists()


def test_resolution_must_fit_the_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resolution_px=18 is not a multiple of 4.*such as 20"):
        encode_whole(encode_config(tmp_path, tmp_path / "latents", resolution_px=18), FakeAutoencoder())


def test_class_ids_out_of_range(tmp_path: Path) -> None:
    pictures = [member for number in range(3) for member in sample(number)]
    refused(write_tar(tmp_path / "a.tar", pictures + sample(4, cls=b"3", json=b"{}")), "p0004", "class id 3, wanted 0 to 2")
    refused(write_tar(tmp_path / "b.tar", pictures + sample(4, cls=b"-2")), "p0004", "class id -2")
    refused(write_tar(tmp_path / "c.tar", sample(4, cls=b"123456789", json=b"{}")), "p0004", "wanted 0 to 99999")


def test_classes_that_contradict(tmp_path: Path) -> None:
    named = json.dumps({"class_name": "flags"}).encode()
    refused(write_tar(tmp_path / "a.tar", sample(0) + sample(1, json=named)), "p0001", "class id 1 is named 'flags'")
    refused(write_tar(tmp_path / "b.tar", sample(0) + sample(1, cls=b"0")), "p0001", "id 0 was 'flags'")
    refused(write_tar(tmp_path / "c.tar", sample(0) + sample(1, cls=None)), "'p0001' has no class, others do")


def test_classes_without_names_and_no_classes(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sample(0, json=None) + sample(2, json=None))
    index = encode_whole(encode_config(tar, tmp_path / "named"), FakeAutoencoder())
    assert (index.classes, index.class_counts) == (["0", "1", "2"], [1, 0, 1])
    tar = write_tar(tmp_path / "b.tar", sample(0, json=None, cls=None))
    index = encode_whole(encode_config(tar, tmp_path / "none"), FakeAutoencoder())
    assert (index.classes, index.class_counts) == ([], [])


def test_pictures_of_any_size_and_bf16(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", sample(0, png=encoded(picture(0, 40, 23))) + sample(1, png=encoded(picture(1, 5, 90))))
    index = encode_whole(encode_config(tar, tmp_path / "latents", precision="bf16"), FakeAutoencoder())
    assert index.samples == 2 and (index.latent.height, index.latent.width) == (4, 4)


def test_command_prints_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = encode_config(tar_of(tmp_path / "x.tar", 5), tmp_path / "latents")
    monkeypatch.setattr(
        "lpl_pretrain.encoding.encode.encode", lambda config, world, encode=encode: encode(config, FakeAutoencoder())
    )
    command.run(config)
    assert "5 samples, 3 classes, 1 shards" in (out := capsys.readouterr().out) and "pictures/s" in out
    command.run(config)
    assert "left alone" in capsys.readouterr().out


def test_shipped_config_is_valid() -> None:
    config = load_config(EncodeConfig, Path(__file__).parents[3] / "configs" / "encode" / "emoji.yaml")
    assert config.source == "asset:emoji/train.tar"
