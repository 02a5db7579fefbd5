"""Reading latents by global sample count: the right ones, ahead of time, and damage named by shard and key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.data.ahead import map_ahead
from lpl_pretrain.data.format import END_OF_ARCHIVE, pack_sample, scan_shard
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.errors import DataError
from tests.unit.data.material import FakeAutoencoder, picture

SHAPE = (4, 4, 4)


def everything(stream: LatentStream) -> None:
    stream.read(range(stream.index.samples))


def replace_shard(folder: Path, number: int, *samples: tuple[str, np.ndarray, int]) -> str:
    """Another shard in its place, and an index that agrees with its size."""
    raw = b"".join(pack_sample(key, moments, label, None, {}) for key, moments, label in samples) + END_OF_ARCHIVE
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][number]
    assert entry["samples"] == len(samples)
    entry["bytes"] = len(raw)
    (folder / entry["file"]).write_bytes(raw)
    (folder / "index.json").write_text(json.dumps(index))
    return entry["file"]


def healthy(folder: Path, number: int) -> list[tuple[str, np.ndarray, int]]:
    layout = scan_shard(folder / read_index(folder).shards[number].file)
    return [(key, np.ones(SHAPE, dtype=np.float16), int(label)) for key, label in zip(layout.keys, layout.labels, strict=True)]


def refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(DataError) as error:
        everything(LatentStream(folder, seed=0))
    for fragment in fragments:
        assert fragment in str(error.value)


def test_reads_the_sample_that_the_order_names(data_set: Path) -> None:
    stream = LatentStream(data_set, seed=5)
    counts = [3, 40, 0, 22, 23, 3]
    batch = stream.read(counts)
    assert batch.moments.shape == (6, *SHAPE) and batch.moments.dtype == torch.float32
    assert batch.labels.dtype == batch.sample_indices.dtype == torch.int64
    assert batch.sample_indices.tolist() == counts
    for row, number in enumerate(stream.order.dataset_index(counts).tolist()):
        images = torch.from_numpy(picture(number)).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert torch.equal(batch.moments[row], FakeAutoencoder().encode_moments(images)[0].half().float())
        assert batch.labels[row] == number % 3


def test_one_epoch_is_every_sample(data_set: Path) -> None:
    stream = LatentStream(data_set, seed=0)
    first, second = stream.read(range(23)), stream.read(range(23, 46))
    assert not torch.equal(first.moments, second.moments)
    rows = [{tuple(row.flatten().tolist()) for row in batch.moments} for batch in (first, second)]
    assert rows[0] == rows[1] and len(rows[0]) == 23


def test_same_rows_for_any_cut_and_resume(data_set: Path) -> None:
    whole = LatentStream(data_set, seed=0).read(range(96)).moments
    for share in (1, 3, 8, 32, 96):
        stream = LatentStream(data_set, seed=0)
        pieces = [stream.read(range(start, start + share)).moments for start in range(0, 96, share)]
        assert torch.equal(torch.cat(pieces), whole)


def test_to_device(data_set: Path) -> None:
    batch = LatentStream(data_set, seed=0).read([0]).to("meta")
    assert {batch.moments.device.type, batch.labels.device.type, batch.sample_indices.device.type} == {"meta"}


def test_close_and_go_on(data_set: Path) -> None:
    stream = LatentStream(data_set, seed=0)
    before = stream.read(range(4))
    stream.close()
    assert torch.equal(stream.read(range(4)).moments, before.moments)


def test_prefetch_equals_read(data_set: Path) -> None:
    stream = LatentStream(data_set, seed=0)
    requests = [range(start, start + 5) for start in range(0, 100, 5)]
    got = list(stream.prefetch(requests))
    assert len(got) == 20
    for batch, request in zip(got, requests, strict=True):
        assert batch.sample_indices.tolist() == list(request)
        assert torch.equal(batch.moments, stream.read(request).moments)


def test_prefetch_raises_in_the_consumer_at_the_right_batch(data_set: Path) -> None:
    stream = LatentStream(data_set, seed=0)
    batches = stream.prefetch([[0], [1], [-1], [3]])
    assert [next(batches).sample_indices.item(), next(batches).sample_indices.item()] == [0, 1]
    with pytest.raises(AssertionError):
        next(batches)


def test_prefetch_is_bounded_and_closes(data_set: Path) -> None:
    asked = []

    def endless() -> Iterator[list[int]]:
        for count in range(10**9):
            asked.append(count)
            yield [count]

    threads = threading.active_count()
    batches = LatentStream(data_set, seed=0).prefetch(endless())
    next(batches)
    time.sleep(0.05)
    assert len(asked) <= 5 and threading.active_count() == threads + 1
    batches.close()
    assert threading.active_count() == threads


def test_map_ahead_works_while_the_consumer_does() -> None:
    both = threading.Barrier(2, timeout=5)  # passes only when an item is worked on while the consumer waits here
    results = map_ahead(lambda item: both.wait() if item == 1 else item, range(4), threads=1, ahead=2)
    assert next(results) == 0
    both.wait()
    assert len(list(results)) == 3


def test_checksums(data_set: Path) -> None:
    stream = LatentStream(data_set, seed=0)
    stream.verify()
    shard = data_set / stream.index.shards[1].file
    raw = bytearray(shard.read_bytes())
    raw[700] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=f"{shard.name}: sha256 is .*index.json says {stream.index.shards[1].sha256}"):
        LatentStream(data_set, seed=0).verify()


def test_truncated_and_missing_shards_are_found_when_it_opens(data_set: Path) -> None:
    entry = read_index(data_set).shards[2]
    shard = data_set / entry.file
    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(DataError, match=f"{entry.file}: has {entry.bytes - 700} bytes, index.json says {entry.bytes}"):
        LatentStream(data_set, seed=0)
    shard.unlink()
    with pytest.raises(DataError, match=f"{entry.file}: missing"):
        LatentStream(data_set, seed=0)


def test_unfinished_folder(data_set: Path) -> None:
    (data_set / "index.json").unlink()
    with pytest.raises(DataError, match="index.json: not found"):
        LatentStream(data_set, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_latent(data_set: Path, value: float) -> None:
    samples = healthy(data_set, 1)
    samples[2][1][1, 2, 3] = value
    refused(data_set, replace_shard(data_set, 1, *samples), repr(samples[2][0]), "NaN or infinity")
    stream = LatentStream(data_set, seed=0)
    stream.verify(share=0, shares=len(stream.index.shards))  # the first shard is somebody's healthy share
    with pytest.raises(DataError, match=f"{samples[2][0]}.*NaN or infinity"):
        stream.verify()


def test_wrong_shape(data_set: Path) -> None:
    samples = healthy(data_set, 1)
    samples[0] = (samples[0][0], np.ones((4, 4, 5), dtype=np.float16), 0)
    refused(data_set, replace_shard(data_set, 1, *samples), repr(samples[0][0]), "(4, 4, 5)", "(4, 4, 4)")


@pytest.mark.parametrize("label", [3, -1, 99])
def test_class_id_out_of_range(data_set: Path, label: int) -> None:
    samples = healthy(data_set, 0)
    samples[1] = (*samples[1][:2], label)
    refused(data_set, replace_shard(data_set, 0, *samples), repr(samples[1][0]), f"class id {label} is out of range", "3 classes")


def test_duplicate_keys(data_set: Path) -> None:
    samples = healthy(data_set, 0)
    refused(data_set, replace_shard(data_set, 0, *samples[:-1], samples[0]), repr(samples[0][0]), "twice")


def test_index_that_disagrees_with_its_shards(data_set: Path) -> None:
    index = json.loads((data_set / "index.json").read_text())
    index["shards"][0]["samples"] += 1
    (data_set / "index.json").write_text(json.dumps(index))
    refused(data_set, "23 samples, its shards 24")
    index["samples"] += 1
    (data_set / "index.json").write_text(json.dumps(index))
    refused(data_set, index["shards"][0]["file"], "index.json says")
