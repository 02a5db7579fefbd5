"""Reads latents by sample index: the right ones, ahead of the consumer; bad samples are named by
shard and key, or replaced alike on every layout.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lpl_pretrain.config.dataset import contents_of, index_bytes, read_index, sealed
from lpl_pretrain.data.offsets import Offsets, key_at
from lpl_pretrain.data.prefetch import prefetch_map
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.errors import ConfigError, DataError
from tests.support.image_tars import (
    FakeAutoencoder,
    data_config,
    encode_config,
    encode_dataset,
    encode_image,
    random_image,
    tar_sample,
    write_tar,
)
from tests.support.indexes import rewrite_index, simulated_index
from tests.support.work import count_work

SHAPE = (4, 4, 4)
CLASSES = 3


def open_stream(
    folder: Path | dict[str, float], seed: int = 0, batch: int = 8, **options: object
) -> LatentStream:
    return LatentStream(data_config(folder, **options), seed, batch)


def everything(stream: LatentStream) -> None:
    stream.read(range(stream.index.samples))


def refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(DataError) as error:
        everything(open_stream(folder))
    for fragment in fragments:
        assert fragment in str(error.value)


def shard_and_offsets(folder: Path, number: int) -> tuple[Path, Offsets]:
    entry = read_index(folder).shards[number]
    path = folder / entry.file
    return path, Offsets.read(path.with_suffix(".offsets.safetensors"), entry)


def overwrite(folder: Path, number: int, row: int, offset: int, data: bytes) -> str:
    """Overwrites bytes of a sample's moments at `offset` in its .npy; returns the sample's key."""
    path, offsets = shard_and_offsets(folder, number)
    with open(path, "r+b") as file:
        file.seek(int(offsets.moments[row]) + offset)
        file.write(data)
    return key_at(path, offsets, row)


def expected(number: int) -> torch.Tensor:
    images = torch.from_numpy(random_image(number)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return FakeAutoencoder().encode_moments(images)[0].half()


def test_reads_the_sample_that_the_order_names(data_set: Path) -> None:
    stream = open_stream(data_set, seed=5)
    indices = [3, 40, 0, 22, 23, 3]
    batch = stream.read(indices)
    assert batch.moments.shape == (6, *SHAPE) and batch.moments.dtype == torch.float16
    assert batch.labels.dtype == batch.sample_indices.dtype == batch.sizes.dtype == torch.int64
    assert batch.sample_indices.tolist() == indices
    first = np.cumsum([0, *(entry.samples for entry in stream.index.shards)])
    locations = stream.order.locate(indices)
    for row, number in enumerate((first[locations.shard] + locations.row).tolist()):
        assert torch.equal(batch.moments[row], expected(number)) and batch.labels[row] == number % 3
        assert batch.sizes[row].tolist() == [16, 16, 0, 0, 16, 16]


def test_one_epoch_is_every_sample(data_set: Path) -> None:
    stream = open_stream(data_set)
    first, second = stream.read(range(23)), stream.read(range(23, 46))
    assert not torch.equal(first.moments, second.moments)
    rows = [{tuple(row.flatten().tolist()) for row in batch.moments} for batch in (first, second)]
    assert rows[0] == rows[1] and len(rows[0]) == 23


def test_same_rows_for_any_cut_and_resume(data_set: Path) -> None:
    whole = open_stream(data_set, lanes=2, shuffle_block_samples=4).read(range(96)).moments
    for size in (1, 3, 8, 32, 96):
        stream = open_stream(data_set, lanes=2, shuffle_block_samples=4)
        pieces = [stream.read(range(start, start + size)).moments for start in range(0, 96, size)]
        assert torch.equal(torch.cat(pieces), whole)


def test_to_device_is_float32(data_set: Path) -> None:
    stream = open_stream(data_set)
    batch = stream.read([0]).to("meta")
    assert {batch.moments.device.type, batch.labels.device.type, batch.sizes.device.type} == {
        "meta"
    }
    moved = stream.read([0]).to("cpu")
    assert moved.moments.dtype == torch.float32 and torch.equal(
        moved.moments, stream.read([0]).moments.float()
    )


def test_close_and_go_on(data_set: Path) -> None:
    stream = open_stream(data_set)
    before = stream.read(range(4))
    stream.close()
    assert torch.equal(stream.read(range(4)).moments, before.moments)


def test_open_shards_are_limited(data_set: Path) -> None:
    stream = open_stream(data_set, lanes=1, shuffle_block_samples=1)
    stream.read(range(23))
    assert len(stream.shards) <= 4


def test_ten_million_samples_open_at_any_index_with_little_work(tmp_path: Path) -> None:
    """A simulated index of 1,221 shards, whose files are sparse; counts calls before the first
    read.
    """
    index = simulated_index(
        "big", {(32, 32): [8192] * 1000, (40, 24): [8192] * 221}, bytes_each=20_000
    )
    for entry in index.shards:
        with open(tmp_path / entry.file, "wb") as file:
            file.truncate(entry.bytes)
    (tmp_path / "index.json").write_bytes(index_bytes(sealed(index)))
    opened = []

    def open_and_locate() -> None:
        stream = open_stream(tmp_path, batch=1024)
        opened.append((stream, stream.order.locate(np.arange(10_000_384, 10_000_384 + 1024))))

    work = count_work(open_and_locate)
    ((stream, locations),) = opened
    assert work.calls < 100 * len(stream.index.shards)
    assert stream.index.samples > 10_000_000 and len(set(locations.shard.tolist())) > 10


def test_state_has_the_data_position(data_set: Path) -> None:
    stream = open_stream(data_set, seed=3)
    state = stream.state(50)
    assert state.pop("contents") == contents_of(stream.index)
    assert state == {
        "samples_seen": 50,
        "epoch": 2,
        "seed": 3,
        "fingerprint": stream.index.fingerprint,
    }


def test_prefetch_equals_read(data_set: Path) -> None:
    stream = open_stream(data_set)
    requests = [range(start, start + 5) for start in range(0, 100, 5)]
    got = list(stream.prefetch(requests))
    assert len(got) == 20
    for batch, request in zip(got, requests, strict=True):
        assert batch.sample_indices.tolist() == list(request)
        assert torch.equal(batch.moments, stream.read(request).moments)


def test_prefetch_raises_in_the_consumer_at_the_right_batch(data_set: Path) -> None:
    stream = open_stream(data_set)
    batches = stream.prefetch([[0], [1], [-1], [3]])
    assert [next(batches).sample_indices.item(), next(batches).sample_indices.item()] == [0, 1]
    with pytest.raises(AssertionError):
        next(batches)


def test_prefetch_to_a_device(data_set: Path) -> None:
    stream, threads = open_stream(data_set), threading.active_count()
    batches = stream.prefetch(
        [range(start, start + 4) for start in range(0, 40, 4)], torch.device("cpu")
    )
    for start in range(0, 20, 4):
        batch = next(batches)
        assert batch.moments.dtype == torch.float32 and batch.sample_indices.tolist() == list(
            range(start, start + 4)
        )
    batches.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(data_set: Path, workers: int) -> None:
    requests = [range(start, start + 5) for start in range(0, 200, 5)]
    wanted = list(open_stream(data_set).prefetch(requests))
    got = list(
        open_stream(data_set, workers=workers, lanes=2, shuffle_block_samples=4).prefetch(requests)
    )
    alike = list(open_stream(data_set, lanes=2, shuffle_block_samples=4).prefetch(requests))
    assert all(torch.equal(a.moments, b.moments) for a, b in zip(got, alike, strict=True))
    assert not all(
        torch.equal(a.moments, b.moments) for a, b in zip(got, wanted, strict=True)
    )  # another order gives other batches


def test_prefetch_is_bounded_and_closes(data_set: Path) -> None:
    asked = []

    def endless() -> Iterator[list[int]]:
        for index in range(10**9):
            asked.append(index)
            yield [index]

    threads = threading.active_count()
    batches = open_stream(data_set).prefetch(endless())
    next(batches)
    time.sleep(0.05)
    assert len(asked) <= 5 and threading.active_count() == threads + 1
    batches.close()
    assert threading.active_count() == threads


def test_prefetch_map_works_while_the_consumer_does() -> None:
    both = threading.Barrier(
        2, timeout=5
    )  # passes only when an item is worked on while the consumer waits here
    results = prefetch_map(
        lambda item: both.wait() if item == 1 else item, range(4), threads=1, buffer_size=2
    )
    assert next(results) == 0
    both.wait()
    assert len(list(results)) == 3


def test_checksums(data_set: Path) -> None:
    stream = open_stream(data_set)
    assert stream.verify() == []
    key = overwrite(data_set, 1, 2, 130, b"\x01")
    entry = stream.index.shards[1]
    with pytest.raises(
        DataError,
        match=f"sample '{key}', in .*{entry.file}: sha256 is .*index.json says {entry.sha256}",
    ):
        open_stream(data_set).verify()
    assert (
        open_stream(data_set).verify(rank=0, world_size=len(stream.index.shards)) == []
    )  # shards of a rank without the corrupt one


def test_truncated_and_missing_shards_are_detected_at_opening(data_set: Path) -> None:
    entry = read_index(data_set).shards[2]
    shard = data_set / entry.file
    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(
        DataError,
        match=f"{entry.file}: has {entry.bytes - 700} bytes, index.json says {entry.bytes}",
    ):
        open_stream(data_set)
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=f"{entry.file}: has 0 bytes"):
        open_stream(data_set)
    shard.unlink()
    with pytest.raises(DataError, match=f"{entry.file}: missing"):
        open_stream(data_set)


def test_unfinished_folder(data_set: Path) -> None:
    (data_set / "index.json").unlink()
    with pytest.raises(DataError, match="index.json: not found"):
        open_stream(data_set)


def test_a_folder_of_an_older_version(data_set: Path) -> None:
    rewrite_index(data_set, lambda index: index.update(format_version=1))
    with pytest.raises(
        DataError, match="format_version is 1, this version reads 2 and 3: encode the folder again"
    ):
        open_stream(data_set)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_a_latent(data_set: Path, value: float) -> None:
    key = overwrite(data_set, 1, 2, 128 + 40, np.float16(value).tobytes())
    refused(data_set, repr(key), "NaN or infinity")


def test_large_values_are_not_nan(data_set: Path) -> None:
    overwrite(data_set, 1, 2, 128, np.array([65504, -65504, 6e-8, 0], np.float16).tobytes())
    everything(open_stream(data_set))


@pytest.mark.parametrize("offset", [0, 8, 100])
def test_an_array_that_does_not_match_the_index(data_set: Path, offset: int) -> None:
    key = overwrite(data_set, 1, 2, offset, b"junk")
    refused(data_set, repr(key), "moments.npy is not the array that index.json describes")


def test_offsets_of_another_folder(data_set: Path) -> None:
    path = next(data_set.glob("*.offsets.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused(data_set, path.name, "sha256 is")
    path.unlink()
    refused(data_set, path.name, "cannot be read")


@pytest.mark.parametrize("classes", [["a", "b"], []])
def test_class_id_out_of_range(data_set: Path, classes: list[str]) -> None:
    counts = [8, 15] if classes else []
    rewrite_index(data_set, lambda index: index.update(classes=classes, class_counts=counts))
    refused(data_set, "is out of range", f"{len(classes)} classes")


def test_index_that_disagrees_with_its_shards(data_set: Path) -> None:
    rewrite_index(data_set, lambda index: index["shards"][0].update(samples=6))
    refused(data_set, "23 samples, its shards 24")

    def consistent(index: dict) -> None:
        index["samples"] += 1
        index["buckets"][0]["samples"] += 1
        index["class_counts"][0] += 1

    rewrite_index(data_set, consistent)
    refused(data_set, read_index(data_set).shards[0].file, "index.json says")


# --- on_error: skip


def corrupt_data_set(data_set: Path) -> set[str]:
    """Keys of the corrupt samples: a NaN, a bit flip in a header, and one in a value, which only
    the checksum detects.
    """
    return {
        overwrite(data_set, 0, 1, 128 + 8, np.float16(np.nan).tobytes()),
        overwrite(data_set, 1, 0, 3, b"\xff"),
        overwrite(data_set, 2, 2, 128, b"\x01\x3c"),
    }


def test_bad_samples_are_skipped_counted_and_replaced_alike_on_every_layout(
    data_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt_data_set(data_set)
    options = {
        "on_error": "skip",
        "max_skipped_fraction": 0.2,
        "lanes": 2,
        "shuffle_block_samples": 4,
    }
    whole = open_stream(data_set, **options)
    whole.bad_samples.extend(whole.verify())
    assert whole.bad_samples.num_samples() == 3 and caplog.text.count("skipped from now on") == 3
    wanted = whole.read(range(96)).moments
    bad = expected(11 + 2)  # the third of shard 2
    bad[0, 0, 0] = 1.0
    assert not any(
        torch.equal(row, bad) for row in wanted
    )  # never read, though its values look valid
    for size in (1, 3, 8, 32):
        stream = open_stream(data_set, **options)
        stream.bad_samples.extend(whole.verify())  # as the ranks broadcast them
        pieces = [stream.read(range(start, start + size)).moments for start in range(0, 96, size)]
        assert torch.equal(torch.cat(pieces), wanted)
    healthy = open_stream(data_set, **options)
    locations = healthy.order.locate(np.arange(96))
    untouched = [
        i
        for i in range(96)
        if (int(locations.shard[i]), int(locations.row[i])) not in {(0, 1), (1, 0), (2, 2)}
    ]
    assert torch.equal(
        healthy.read(untouched).moments, wanted[untouched]
    )  # others keep their index
    assert 96 - len(untouched) > 5


def test_bad_samples_detected_while_reading_are_skipped_too(
    data_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overwrite(data_set, 0, 1, 128 + 8, np.float16(np.nan).tobytes())
    stream = open_stream(data_set, on_error="skip", max_skipped_fraction=0.05)
    for epoch in range(3):
        assert stream.read(range(23 * epoch, 23 * epoch + 23)).moments.isfinite().all()
    assert caplog.text.count("skipped from now on") == 1


def test_a_missing_shard_can_be_skipped(data_set: Path) -> None:
    entry = read_index(data_set).shards[3]
    (data_set / entry.file).unlink()
    stream = open_stream(data_set, on_error="skip", max_skipped_fraction=0.3)
    assert stream.bad_samples.num_samples() == entry.samples
    batch = stream.read(range(230))
    first = sum(shard.samples for shard in stream.index.shards[:3])
    lost = [expected(number) for number in range(first, 23)]
    assert not any(torch.equal(row, gone) for row in batch.moments for gone in lost)
    with pytest.raises(
        DataError, match=f"{entry.samples} of 23 samples cannot be read.*max_skipped_fraction=0.1"
    ):
        open_stream(data_set, on_error="skip", max_skipped_fraction=0.1)


def test_too_many_bad_samples_stop_the_run(data_set: Path) -> None:
    corrupt_data_set(data_set)
    stream = open_stream(data_set, on_error="skip", max_skipped_fraction=0.1)
    with pytest.raises(
        DataError, match="3 of 23 samples cannot be read, more than data.max_skipped_fraction=0.1"
    ):
        stream.bad_samples.extend(stream.verify())


# --- several folders, buckets, flips


def encode_numbers(
    folder: Path,
    name: str,
    numbers: list[int],
    shape: tuple[int, int] = (16, 16),
    **options: object,
) -> Path:
    members = [m for n in numbers for m in tar_sample(n, png=encode_image(random_image(n, *shape)))]
    folder.mkdir(exist_ok=True)
    output = folder / name
    encode_dataset(
        encode_config(
            write_tar(folder / f"{name}.tar", members), output, shard_samples=4, **options
        ),
        FakeAutoencoder(),
    )
    return output


def test_folders_mixed_by_weight(tmp_path: Path) -> None:
    a = encode_numbers(tmp_path, "a", list(range(9)))
    b = encode_numbers(tmp_path, "b", list(range(9, 12)))
    stream = open_stream({str(a): 1.0, str(b): 3.0})
    batch = stream.read(range(4096))
    fraction = (
        torch.tensor(
            [any(torch.equal(row, expected(n)) for n in (9, 10, 11)) for row in batch.moments[:400]]
        )
        .float()
        .mean()
    )
    assert 0.68 < fraction < 0.82
    assert stream.index.samples == 12 and len(stream.index.fingerprint) == 64
    other = open_stream({str(a): 1.0, str(b): 2.0})
    assert other.index.fingerprint != stream.index.fingerprint


def test_folders_that_cannot_be_mixed(tmp_path: Path) -> None:
    a = encode_numbers(tmp_path, "a", [0, 1, 2])
    b = encode_numbers(tmp_path, "b", [3, 4, 5], moments_dtype="bf16")
    with pytest.raises(DataError, match="folders of different moments_dtype cannot be mixed"):
        open_stream({str(a): 1.0, str(b): 1.0})

    def other(index: dict) -> None:
        index["moments_dtype"] = "fp16"
        index["autoencoder"]["identity"] = "other"

    rewrite_index(b, other)
    with pytest.raises(
        DataError,
        match="folders of different autoencoder cannot be mixed: .*a has fake, .*b has other",
    ):
        open_stream({str(a): 1.0, str(b): 1.0})

    def larger(index: dict) -> None:
        index["resolution_px"] = 32
        index["autoencoder"]["identity"] = "fake"

    rewrite_index(b, larger)
    with pytest.raises(
        DataError,
        match="folders of different resolution_px cannot be mixed: .*a has 16, .*b has 32",
    ):
        open_stream({str(a): 1.0, str(b): 1.0})
    with pytest.raises(
        ConfigError, match="its weight is 0.0001 of the whole, wanted at least 1/4096"
    ):
        open_stream({str(a): 9999.0, str(b): 1.0})


def test_bf16_moments(tmp_path: Path) -> None:
    stream = open_stream(encode_numbers(tmp_path, "a", [0], moments_dtype="bf16"))
    images = torch.from_numpy(random_image(0)).permute(2, 0, 1)[None].float() / 127.5 - 1
    batch = stream.read([0])
    assert batch.moments.dtype == torch.bfloat16
    assert torch.equal(batch.moments, FakeAutoencoder().encode_moments(images).bfloat16())
    overwrite(tmp_path / "a", 0, 0, 128, b"\x80\x7f")  # infinity in bfloat16, a number in float16
    refused(tmp_path / "a", "NaN or infinity")


def test_buckets(tmp_path: Path) -> None:
    members = []
    for number in range(30):
        shape = [(16, 16), (24, 10), (10, 24)][number % 3]
        members += tar_sample(number, png=encode_image(random_image(number, *shape)))
    output = tmp_path / "latents"
    config = encode_config(
        write_tar(tmp_path / "x.tar", members),
        output,
        shard_samples=8,
        buckets={"max_aspect": 3.0, "step_px": 4},
    )
    index = encode_dataset(config, FakeAutoencoder())
    assert len(index.buckets) == 3 and all(bucket.samples == 10 for bucket in index.buckets)
    stream = open_stream(output, batch=6)
    shapes = [
        tuple(stream.read(range(start, start + 6)).moments.shape) for start in range(0, 6 * 20, 6)
    ]
    assert {shape[1:] for shape in shapes} == {(4, b.height, b.width) for b in index.buckets}
    batch = stream.read(range(6))
    assert batch.sizes[:, 4:].tolist() == [[4 * side for side in batch.moments.shape[2:]]] * 6
    assert stream.read([2, 5]).moments.shape[0] == 2  # any part of one global batch
    with pytest.raises(AssertionError, match="different global batches"):
        stream.read(range(120))


def test_flips(tmp_path: Path) -> None:
    folder = encode_numbers(tmp_path, "a", list(range(12)), (16, 20), flips=True, crop="random")
    plain, flipped = open_stream(folder, batch=12), open_stream(folder, batch=12, flips=True)
    straight, mixed = plain.read(range(120)), flipped.read(range(120))
    turned = torch.tensor(
        [not torch.equal(a, b) for a, b in zip(straight.moments, mixed.moments, strict=True)]
    )
    assert 40 < turned.sum() < 80
    assert torch.equal(
        mixed.moments[turned], straight.moments[turned].flip(-1)
    )  # this stand-in encoder commutes with mirrors
    assert torch.equal(mixed.sizes[~turned], straight.sizes[~turned])
    assert (
        torch.equal(mixed.sizes[turned, 3], 20 - 16 - straight.sizes[turned, 3])
        and straight.sizes[:, 3].unique().numel() > 1
    )
    again = open_stream(folder, batch=12, flips=True)
    assert torch.equal(again.read([70, 3]).moments, mixed.moments[[70, 3]])
    with pytest.raises(ConfigError, match="holds no flipped latents"):
        open_stream(encode_numbers(tmp_path, "b", [0]), flips=True)
