"""Encoding: the folder that it writes, finished folders that it leaves alone, errors."""

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
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.load import load_config
from lpl_pretrain.data.stream import LatentStream, RequestedFields
from lpl_pretrain.encoding.encode import check_shapes, encode
from lpl_pretrain.encoding.latent_statistics import LatentStatistics
from lpl_pretrain.errors import ConfigError, DataError
from tests.support.image_tars import (
    CLASSES,
    FakeAutoencoder,
    data_config,
    encode_config,
    encode_dataset,
    encode_image,
    encode_tar,
    image_tar,
    random_image,
    tar_sample,
    write_tar,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def expected_moments(number: int) -> np.ndarray:
    images = torch.from_numpy(random_image(number)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return FakeAutoencoder().encode_moments(images)[0].half().numpy()


def refused(source: Path, *fragments: str) -> None:
    output = source.parent / "latents"
    with pytest.raises(DataError) as error:
        encode_dataset(encode_config(source, output), FakeAutoencoder())
    for fragment in fragments:
        assert fragment in str(error.value)
    assert not (output / "index.json").exists()


def test_folder_and_index(tmp_path: Path) -> None:
    folder, index = encode_tar(tmp_path, 23, shard_samples=6)
    assert read_index(folder) == index
    files = [
        name
        for shard in index.shards
        for name in (shard.file, shard.file.replace(".tar", ".offsets.safetensors"))
    ]
    assert sorted(contents(folder)) == sorted(["index.json", *files])
    assert (index.samples, index.classes, index.class_counts) == (23, list(CLASSES), [8, 8, 7])
    assert index.autoencoder.model_dump() == {
        "name": "fake",
        "identity": "fake",
        "downscale": 4,
        "shift": 0.25,
        "scale": 2.0,
    }
    assert (
        index.latent.channels,
        index.latent.height,
        index.latent.width,
        index.resolution_px,
    ) == (2, 4, 4, 16)
    assert sum(shard.samples for shard in index.shards) == 23
    for shard in index.shards:
        raw = (folder / shard.file).read_bytes()
        assert (
            len(raw) == shard.bytes
            and shard.samples <= 6
            and hashlib.sha256(raw).hexdigest() == shard.sha256
        )


def test_webdataset_reads_the_folder(data_set: Path) -> None:
    urls = [str(path) for path in sorted(data_set.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"p{number:04d}" for number in range(23)]
    for number, stored in enumerate(samples):
        assert np.array_equal(stored["moments.npy"], expected_moments(number))
        assert (stored["cls"], stored["txt"]) == (number % 3, f"picture {number}")
        assert stored["json"] == {
            "class_name": CLASSES[number % 3],
            "source_px": [16, 16],
            "resized_px": [16, 16],
            "crop_px": [0, 0],
            "image_sha256": hashlib.sha256(encode_image(random_image(number))).hexdigest(),
        }


def test_statistics_are_those_of_draws_from_the_posterior(data_set: Path) -> None:
    moments = np.stack([expected_moments(number) for number in range(23)]).astype(np.float64)
    mean, std = moments[:, :2], moments[:, 2:]
    latent = read_index(data_set).latent
    np.testing.assert_allclose(latent.mean, mean.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(
        latent.std,
        np.sqrt(mean.var(axis=(0, 2, 3)) + np.square(std).mean(axis=(0, 2, 3))),
        rtol=1e-12,
    )
    assert (
        np.abs(np.array(latent.std) - mean.std(axis=(0, 2, 3))).min() > 0.1
    )  # the posterior's own variance counts


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


def test_an_interrupted_encode_is_repeated(tmp_path: Path) -> None:
    folder, _ = encode_tar(tmp_path, 5)
    whole = contents(folder)
    (folder / "index.json").unlink()
    next(folder.glob("latents-*.tar")).write_bytes(b"half")
    (folder / ".latents-00000-0000-000-4x4.tar.123.tmp").write_bytes(b"killed here")
    encode_tar(tmp_path, 5)
    assert contents(folder) == whole


def test_a_failing_encode_leaves_no_index(tmp_path: Path) -> None:
    refused(
        write_tar(tmp_path / "x.tar", tar_sample(0) + tar_sample(1, png=b"no image")),
        "x.tar:p0001.png",
    )


def test_a_finished_folder_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, index = encode_tar(tmp_path, 5)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with caplog.at_level("INFO", logger="lpl_pretrain"):
        assert encode_tar(tmp_path, 5)[1] == index
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    assert "left alone" in caplog.text


def test_source_fingerprint_does_not_depend_on_how_images_are_packed(tmp_path: Path) -> None:
    _, index = encode_tar(tmp_path, 3)
    tars = [str(write_tar(tmp_path / f"{number}.tar", tar_sample(number))) for number in (2, 0, 1)]
    apart = encode_dataset(encode_config(tars, tmp_path / "apart"), FakeAutoencoder())
    assert (
        apart.source_fingerprint == index.source_fingerprint
        and apart.fingerprint != index.fingerprint
    )


class OtherAutoencoder(FakeAutoencoder):
    identity = "other"


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"autoencoder": OtherAutoencoder()}, "source or encoders have changed"),
        ({"resolution_px": 32}, "resolution_px 16 there, 32 now"),
        (
            {"image": tar_sample(1, png=encode_image(random_image(99)))},
            "source or encoders have changed",
        ),
        ({"image": tar_sample(1, cls=b"2", json=b"{}")}, "source or encoders have changed"),
        ({"image": tar_sample(1, txt=b"another caption")}, "source or encoders have changed"),
    ],
)
def test_a_finished_folder_of_other_inputs_is_refused(
    tmp_path: Path, change: dict, fragment: str
) -> None:
    folder, _ = encode_tar(tmp_path, 3)
    before = contents(folder)
    tar = write_tar(
        tmp_path / "images.tar",
        tar_sample(0) + change.get("image", tar_sample(1)) + tar_sample(2),
    )
    config = encode_config(tar, folder, resolution_px=change.get("resolution_px", 16))
    with pytest.raises(DataError, match=fragment) as error:
        encode(config, change.get("autoencoder", FakeAutoencoder()))
    assert str(folder) in str(error.value) and "name another output" in str(error.value)
    assert contents(folder) == before


class BrokenAutoencoder(FakeAutoencoder):
    """Puts `value` into the moments of sample 6 of the run."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.num_encoded = 0

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        moments = super().encode_moments(images)
        if self.num_encoded <= 6 < self.num_encoded + len(images):
            moments[6 - self.num_encoded, 1, 2, 3] = self.value
        self.num_encoded += len(images)
        return moments


@pytest.mark.parametrize(
    ("value", "fragment"), [(np.nan, "reach nan"), (-np.inf, "reach inf"), (70000.0, "reach 70000")]
)
def test_moments_that_float16_cannot_hold_name_the_key(
    tmp_path: Path, value: float, fragment: str
) -> None:
    with pytest.raises(DataError, match=f"'p0006'.*{fragment}"):
        encode_dataset(
            encode_config(image_tar(tmp_path / "x.tar", 9), tmp_path / "latents"),
            BrokenAutoencoder(value),
        )
    assert not (tmp_path / "latents" / "index.json").exists()


def test_resolution_must_fit_the_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resolution_px=18 is not a multiple of 4.*such as 20"):
        encode_dataset(
            encode_config(tmp_path, tmp_path / "latents", resolution_px=18), FakeAutoencoder()
        )


def test_class_ids_out_of_range(tmp_path: Path) -> None:
    images = [member for number in range(3) for member in tar_sample(number)]
    refused(
        write_tar(tmp_path / "a.tar", images + tar_sample(4, cls=b"3", json=b"{}")),
        "p0004",
        "class id 3, wanted 0 to 2",
    )
    refused(
        write_tar(tmp_path / "b.tar", images + tar_sample(4, cls=b"-2")), "p0004", "class id -2"
    )
    refused(
        write_tar(tmp_path / "c.tar", tar_sample(4, cls=b"123456789", json=b"{}")),
        "p0004",
        "wanted 0 to 99999",
    )


def test_contradicting_classes(tmp_path: Path) -> None:
    named = json.dumps({"class_name": "flags"}).encode()
    refused(
        write_tar(tmp_path / "a.tar", tar_sample(0) + tar_sample(1, json=named)),
        "p0001",
        "class id 1 is named 'flags'",
    )
    refused(
        write_tar(tmp_path / "b.tar", tar_sample(0) + tar_sample(1, cls=b"0")),
        "p0001",
        "id 0 was 'flags'",
    )
    refused(
        write_tar(tmp_path / "c.tar", tar_sample(0) + tar_sample(1, cls=None)),
        "'p0001' has no class, others do",
    )


def test_classes_without_names_and_no_classes(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", tar_sample(0, json=None) + tar_sample(2, json=None))
    index = encode_dataset(encode_config(tar, tmp_path / "named"), FakeAutoencoder())
    assert (index.classes, index.class_counts) == (["0", "1", "2"], [1, 0, 1])
    tar = write_tar(tmp_path / "b.tar", tar_sample(0, json=None, cls=None))
    index = encode_dataset(encode_config(tar, tmp_path / "none"), FakeAutoencoder())
    assert (index.classes, index.class_counts) == ([], [])


def test_images_of_any_size_and_bf16(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        tar_sample(0, png=encode_image(random_image(0, 40, 23)))
        + tar_sample(1, png=encode_image(random_image(1, 5, 90))),
    )
    index = encode_dataset(
        encode_config(tar, tmp_path / "latents", precision="bf16"), FakeAutoencoder()
    )
    assert index.samples == 2 and (index.latent.height, index.latent.width) == (4, 4)


def test_command_prints_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = encode_config(image_tar(tmp_path / "x.tar", 5), tmp_path / "latents")
    monkeypatch.setattr(
        "lpl_pretrain.encoding.encode.encode",
        lambda config, world, encode=encode: encode(config, FakeAutoencoder()),
    )
    command.run(config)
    assert (
        "5 samples, 3 classes, 1 shards" in (out := capsys.readouterr().out) and "pictures/s" in out
    )
    command.run(config)
    assert "left alone" in capsys.readouterr().out


def test_shipped_configs_are_valid() -> None:
    shipped = {
        path.name: load_config(EncodeConfig, path)
        for path in (Path(__file__).parents[3] / "configs" / "encode").glob("*.yaml")
    }
    assert shipped["emoji.yaml"].source == "asset:emoji/train.tar" and len(shipped) >= 3
    for config in shipped.values():
        check_shapes(config, downscale=4 if config.resolution_px == 64 else 8)


# --- shapes, crops, flips


def read_samples(folder: Path) -> dict[str, dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {
        stored["__key__"]: stored
        for stored in webdataset.WebDataset(urls, shardshuffle=False).decode()
    }


def tar_of_sizes(path: Path, *sizes: tuple[int, int]) -> Path:
    return write_tar(
        path,
        [
            member
            for n, size in enumerate(sizes)
            for member in tar_sample(n, png=encode_image(random_image(n, *size)))
        ],
    )


def test_buckets_have_shards_of_their_own_with_sorted_keys(tmp_path: Path) -> None:
    tar = tar_of_sizes(
        tmp_path / "x.tar", *[((16, 16), (30, 12), (12, 30), (17, 15))[n % 4] for n in range(20)]
    )
    config = encode_config(
        tar, tmp_path / "latents", buckets={"max_aspect": 3.0, "step_px": 4}, shard_samples=4
    )
    index = encode_dataset(config, FakeAutoencoder())
    shapes = {(bucket.height, bucket.width): bucket.samples for bucket in index.buckets}
    assert (
        sum(shapes.values()) == 20
        and len(shapes) == 3
        and (index.latent.height, index.latent.width) == (4, 4)
    )
    for shard in index.shards:
        bucket = index.buckets[shard.bucket]
        stored = list(
            webdataset.WebDataset(
                str(tmp_path / "latents" / shard.file), shardshuffle=False
            ).decode()
        )
        assert {f["moments.npy"].shape for f in stored} == {(4, bucket.height, bucket.width)}
        assert [f["__key__"] for f in stored] == sorted(f["__key__"] for f in stored)
        assert f"-{bucket.height}x{bucket.width}.tar" in shard.file


def test_random_crops_are_recorded_and_independent_of_other_images(tmp_path: Path) -> None:
    whole = tar_of_sizes(tmp_path / "x.tar", *[(16, 48)] * 12)
    alone = write_tar(tmp_path / "y.tar", tar_sample(7, png=encode_image(random_image(7, 16, 48))))
    for tar in (whole, alone):
        encode_dataset(encode_config(tar, tmp_path / tar.stem, crop="random"), FakeAutoencoder())
    samples = read_samples(tmp_path / "x")
    crops = [stored["json"]["crop_px"] for stored in samples.values()]
    assert len({left for _, left in crops}) > 5 and all(
        top == 0 and 0 <= left <= 32 for top, left in crops
    )
    for n, stored in enumerate(samples.values()):
        left = stored["json"]["crop_px"][1]
        images = (
            torch.from_numpy(random_image(n, 16, 48)[:, left : left + 16].copy())
            .permute(2, 0, 1)[None]
            .float()
            / 127.5
            - 1
        )
        assert np.array_equal(
            stored["moments.npy"], FakeAutoencoder().encode_moments(images)[0].half().numpy()
        )
    assert read_samples(tmp_path / "y")["p0007"]["json"] == samples["p0007"]["json"]


class LopsidedAutoencoder(FakeAutoencoder):
    """Does not commute with mirroring, as real autoencoders do not."""

    identity = "lopsided"

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode_moments(images * torch.linspace(0.1, 1.0, images.shape[-1]))


def test_flips_are_encodings_of_the_mirrored_image(tmp_path: Path) -> None:
    encode_dataset(
        encode_config(image_tar(tmp_path / "x.tar", 3), tmp_path / "latents", flips=True),
        LopsidedAutoencoder(),
    )
    for n, stored in enumerate(read_samples(tmp_path / "latents").values()):
        mirrored = (
            torch.from_numpy(random_image(n)[:, ::-1].copy()).permute(2, 0, 1)[None].float() / 127.5
            - 1
        )
        assert np.array_equal(
            stored["moments_flipped.npy"],
            LopsidedAutoencoder().encode_moments(mirrored)[0].half().numpy(),
        )
        assert not np.array_equal(stored["moments_flipped.npy"], stored["moments.npy"][..., ::-1])


def test_class_folders_are_spread_over_the_shards(tmp_path: Path) -> None:
    for n in range(80):
        folder = tmp_path / "images" / f"class{n // 40}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").write_bytes(encode_image(random_image(n)))
    index = encode_dataset(
        encode_config(tmp_path / "images", tmp_path / "latents", shard_samples=20),
        FakeAutoencoder(),
    )
    assert [shard.samples for shard in index.shards] == [20] * 4
    for shard in index.shards:
        labels = [
            f["cls"]
            for f in webdataset.WebDataset(
                str(tmp_path / "latents" / shard.file), shardshuffle=False
            ).decode()
        ]
        assert 4 < sum(labels) < 16


def test_img2dataset_layout(tmp_path: Path) -> None:
    """Tars of jpg + txt + json with the caption in both, and parquet and statistics beside them."""
    (tmp_path / "in").mkdir()
    for shard in range(2):
        members = []
        for n in range(3):
            key = f"{shard:05d}{n:04d}"
            metadata = {
                "caption": f"a picture {n}",
                "url": "https://example.com/x.jpg",
                "status": "success",
                "width": 20,
                "height": 16,
            }
            members += [
                (f"{key}.jpg", encode_image(random_image(n, 16, 20), "JPEG")),
                *([(f"{key}.txt", f"a picture {n}".encode())] if n else []),
                (f"{key}.json", json.dumps(metadata).encode()),
            ]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
        (tmp_path / "in" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / "in" / f"{shard:05d}_stats.json").write_text("{}")
    index = encode_dataset(encode_config(tmp_path / "in", tmp_path / "latents"), FakeAutoencoder())
    assert (index.samples, index.captions, index.classes, len(index.shards)) == (6, 6, [], 2)
    assert [stored["txt"] for stored in read_samples(tmp_path / "latents").values()] == [
        "a picture 0",
        "a picture 1",
        "a picture 2",
    ] * 2


CAPTIONS = [
    "",
    "naïve café",
    "日本語のキャプション",
    "👩‍🚀🏳️‍🌈",
    "a\x00b",
    "line\nbreak\ttab",
    "\u202eright to left",
    "x" * 20_000,
]


def test_captions_in_any_unicode(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        [m for n, text in enumerate(CAPTIONS) for m in tar_sample(n, txt=text.encode())],
    )
    encode_dataset(encode_config(tar, tmp_path / "latents"), FakeAutoencoder())
    assert [stored["txt"] for stored in read_samples(tmp_path / "latents").values()] == CAPTIONS
    stream = LatentStream(data_config(tmp_path / "latents"), 0, 8, RequestedFields(captions=True))
    captions = stream.read(range(8)).captions
    assert captions is not None and sorted(captions) == sorted(CAPTIONS)


# --- on_error: skip


def test_unreadable_images_can_be_skipped_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [member for n in range(12) for member in tar_sample(n)]
    bad = (
        tar_sample(20, png=b"no image")
        + tar_sample(21, png=None)
        + tar_sample(22, cls=b"cat")
        + tar_sample(23, txt=b"\xff")
    )
    tar = write_tar(tmp_path / "x.tar", members[:16] + bad + [("../evil.png", b"")] + members[16:])
    index = encode_dataset(
        encode_config(tar, tmp_path / "latents", on_error="skip", max_skipped_fraction=0.4),
        FakeAutoencoder(),
    )
    assert (index.samples, index.skipped) == (12, 5) and caplog.text.count("skipped: ") == 5
    assert list(read_samples(tmp_path / "latents")) == [f"p{n:04d}" for n in range(12)]
    for fragment in (
        "p0020.png: not a readable",
        "'p0021': has 0 images",
        "'p0022': .cls",
        "'p0023': .cls",
        "../evil.png",
    ):
        assert fragment in caplog.text
    with pytest.raises(
        DataError, match="images cannot be read, more than max_skipped_fraction=0.1"
    ):
        encode(
            encode_config(tar, tmp_path / "other", on_error="skip", max_skipped_fraction=0.1),
            FakeAutoencoder(),
        )
    with pytest.raises(DataError, match="p0021"):
        encode(encode_config(tar, tmp_path / "strict"), FakeAutoencoder())


def test_skipping_gives_the_same_bytes_as_a_source_without_them(tmp_path: Path) -> None:
    whole = image_tar(tmp_path / "whole.tar", 9)
    holes = write_tar(
        tmp_path / "holes.tar",
        [m for n in range(9) for m in tar_sample(n)] + tar_sample(10, png=b"x"),
    )
    for tar in (whole, holes):
        encode_dataset(
            encode_config(tar, tmp_path / tar.stem, on_error="skip", max_skipped_fraction=0.2),
            FakeAutoencoder(),
        )
    tars = [sorted((tmp_path / name).glob("*.tar")) for name in ("whole", "holes")]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]


def test_the_readable_samples_of_a_truncated_tar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = tmp_path / "cut.tar"
    raw = image_tar(tmp_path / "whole.tar", 8).read_bytes()
    cut.write_bytes(raw[: len(raw.rstrip(b"\0")) // 2])
    index = encode_dataset(
        encode_config(cut, tmp_path / "latents", on_error="skip", max_skipped_fraction=0.5),
        FakeAutoencoder(),
    )
    assert index.skipped == 1 and 2 <= index.samples < 8 and "cut.tar: truncated" in caplog.text


def test_everything_skipped_is_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", tar_sample(0, png=b"x"))
    with pytest.raises(DataError, match="1 of 1 images cannot be read"):
        encode(
            encode_config(tar, tmp_path / "latents", on_error="skip", max_skipped_fraction=1.0),
            FakeAutoencoder(),
        )


def test_moments_out_of_range_can_be_skipped_and_fit_bf16(tmp_path: Path) -> None:
    tar = image_tar(tmp_path / "x.tar", 9)
    config = encode_config(tar, tmp_path / "a", on_error="skip", max_skipped_fraction=0.2)
    assert encode_dataset(config, BrokenAutoencoder(70000.0)).skipped == 1
    assert (
        encode_dataset(
            encode_config(tar, tmp_path / "b", moments_dtype="bf16"), BrokenAutoencoder(70000.0)
        ).samples
        == 9
    )
