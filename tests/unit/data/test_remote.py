"""Folders at URLs: the same samples as from a disk, through a cache of limited size, with retries
when the network fails.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.config.schema import CacheConfig
from lpl_pretrain.data import remote
from lpl_pretrain.data.cache import CachedStore
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.errors import ConfigError, DataError
from tests.support.image_tars import (
    FakeAutoencoder,
    data_config,
    encode_config,
    encode_dataset,
    tar_sample,
    write_tar,
)

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def url(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The data set of the other tests in fsspec's memory; retries do not wait."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    if MEMORY.exists("/bucket"):
        MEMORY.rm("/bucket", recursive=True)
    for file in data_set.iterdir():
        MEMORY.pipe(f"/bucket/latents/{file.name}", file.read_bytes())
    return "memory://bucket/latents"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each remote file is opened."""
    counts: Counter[str] = Counter()
    real = MemoryFileSystem._open

    def counting(self, path: str, *args, **kwargs):
        counts[path.rsplit("/", 1)[1]] += 1
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", counting)
    return counts


def open_remote(
    url: str, cache: Path, max_gib: float = 1.0, retries: int = 3, **options: object
) -> LatentStream:
    return LatentStream(
        data_config(
            url, cache={"folder": str(cache), "max_gib": max_gib, "retries": retries}, **options
        ),
        0,
        8,
    )


def test_same_samples_as_from_disk_and_each_file_downloaded_once(
    data_set: Path, url: str, tmp_path: Path, opened
) -> None:
    wanted = LatentStream(data_config(data_set), 0, 8).read(range(60)).moments
    stream = open_remote(url, tmp_path / "cache", workers=3)
    got = [
        batch.moments
        for batch in stream.prefetch([range(start, start + 4) for start in range(0, 60, 4)])
    ]
    assert torch.equal(torch.cat(got), wanted)
    shards = {name: count for name, count in opened.items() if name != "index.json"}
    assert len(shards) == 2 * len(stream.index.shards) and set(shards.values()) == {1}
    again = open_remote(url, tmp_path / "cache")
    assert torch.equal(again.read(range(60)).moments, wanted)
    assert {name: count for name, count in opened.items() if name != "index.json"} == shards
    assert again.verify() == []


def test_the_next_shards_are_prefetched(url: str, tmp_path: Path, opened) -> None:
    stream = open_remote(url, tmp_path / "cache", lanes=2, shuffle_block_samples=3)
    stream.read(range(2))
    deadline = time.monotonic() + 10
    while sum(name.endswith(".tar") for name in opened) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (
        sum(name.endswith(".tar") for name in opened) >= 3
    )  # two are read, others are on their way


class Flaky:
    """Makes opening a file fail, or return corrupt bytes, the first `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, damage: bool = False) -> None:
        self.left = Counter[str]()
        real = MemoryFileSystem._open

        def flaky(fs, path: str, *args, **kwargs):
            self.left[path] += 1
            if self.left[path] > times or path.endswith("index.json"):
                return real(fs, path, *args, **kwargs)
            if damage:
                return io.BytesIO(b"x" + MEMORY.store[path].getvalue()[1:])
            raise ConnectionError("connection reset by peer")

        monkeypatch.setattr(MemoryFileSystem, "_open", flaky)


@pytest.mark.parametrize("damage", [False, True])
def test_failed_and_corrupt_downloads_are_retried(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Flaky(monkeypatch, 2, damage)
    open_remote(url, tmp_path / "cache").read(range(23))
    assert "Retrying" in caplog.text


def test_the_last_failure_names_the_url_and_the_reason(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Flaky(monkeypatch, 99)
    with pytest.raises(
        DataError,
        match=r"memory://bucket/latents/latents-.* cannot be downloaded "
        r"\(connection reset by peer\)",
    ):
        open_remote(url, tmp_path / "cache", retries=1).read(range(23))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]


def test_a_corrupt_remote_file_is_detected_by_its_checksum(url: str, tmp_path: Path) -> None:
    name = read_index(url).shards[0].file
    MEMORY.pipe(f"/bucket/latents/{name}", b"x" + MEMORY.cat(f"/bucket/latents/{name}")[1:])
    with pytest.raises(
        DataError, match=f"{name}: cannot be downloaded .sha256 is .*, index.json says"
    ):
        open_remote(url, tmp_path / "cache", retries=1).read(range(23))
    stream = open_remote(
        url, tmp_path / "cache", retries=0, on_error="skip", max_skipped_fraction=0.3
    )
    assert stream.read(range(100)).moments.isfinite().all()


def test_a_missing_file_is_not_retried(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MEMORY.rm(f"/bucket/latents/{read_index(url).shards[0].file}")
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    with pytest.raises(DataError, match="not found"):
        open_remote(url, tmp_path / "cache", retries=20).read(range(23))
    assert not waits
    with pytest.raises(DataError, match="memory://nowhere/index.json: not found"):
        open_remote("memory://nowhere", tmp_path / "cache")


def test_the_cache_keeps_to_its_size(url: str, tmp_path: Path) -> None:
    index = read_index(url)
    largest = max(entry.bytes for entry in index.shards)
    cache = tmp_path / "cache"
    limit = 2.2 * largest
    stream = open_remote(url, cache, max_gib=limit / 2**30, lanes=1, shuffle_block_samples=2)
    wanted = stream.read(range(69)).moments
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= limit
    assert torch.equal(
        open_remote(url, cache, max_gib=limit / 2**30, lanes=1, shuffle_block_samples=2)
        .read(range(69))
        .moments,
        wanted,
    )
    with pytest.raises(
        ConfigError, match="data.cache.max_gib=.*: 4 shards of up to .* are read side by side"
    ):
        open_remote(url, cache, max_gib=limit / 2**30)


def test_least_recently_used_files_are_evicted(tmp_path: Path) -> None:
    for name in "abc":
        MEMORY.pipe(f"/bucket/{name}", name.encode() * 400)
    digests = {name: hashlib.sha256(name.encode() * 400).hexdigest() for name in "abc"}
    store = CachedStore(
        "memory://bucket",
        CacheConfig(folder=str(tmp_path), max_gib=1000 / 2**30),
        max_file_bytes=400,
        concurrent_files=1,
    )
    a, b = (store.path(name, digests[name], 400) for name in "ab")
    time.sleep(0.01)
    store.path("a", digests["a"], 400)
    store.path("c", digests["c"], 400)
    assert a.exists() and not b.exists()


def test_one_process_downloads_and_the_others_wait(url: str, tmp_path: Path, opened) -> None:
    """The test uses threads: each store has its own locks, as processes have."""
    entry = read_index(url).shards[0]
    config = CacheConfig(folder=str(tmp_path / "cache"))
    stores = [
        CachedStore(url, config, max_file_bytes=entry.bytes, concurrent_files=1) for _ in range(6)
    ]
    threads = [
        threading.Thread(target=store.path, args=(entry.file, entry.sha256, entry.bytes))
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened[entry.file] == 1


# --- encoding from URLs


def test_encoding_remote_tars_and_folders_gives_the_bytes_of_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    if MEMORY.exists("/tars"):
        MEMORY.rm("/tars", recursive=True)
    (tmp_path / "in").mkdir()
    for number in range(3):
        tar = write_tar(
            tmp_path / "in" / f"{number}.tar",
            [m for n in range(4) for m in tar_sample(10 * number + n)],
        )
        MEMORY.pipe(f"/tars/{number}.tar", tar.read_bytes())
    encode_dataset(encode_config(tmp_path / "in", tmp_path / "local"), FakeAutoencoder())
    for number, source in enumerate(
        [
            "memory://tars",
            "memory://tars/*.tar",
            [f"memory://tars/{n}.tar" for n in range(3)],
        ]
    ):
        output = tmp_path / f"remote{number}"
        Flaky(monkeypatch, 1)
        encode_dataset(encode_config(source, output), FakeAutoencoder())
        shards = [path for path in sorted(output.iterdir()) if path.suffix == ".tar"]
        assert [path.read_bytes() for path in shards] == [
            p.read_bytes() for p in sorted((tmp_path / "local").glob("*.tar"))
        ]


def test_encoding_a_remote_image_folder(tmp_path: Path) -> None:
    for member, data in [m for n in range(6) for m in tar_sample(n)]:
        if member.endswith(".png"):
            MEMORY.pipe(f"/images/class{int(member[1:5]) % 2}/{member}", data)
            path = tmp_path / "images" / f"class{int(member[1:5]) % 2}" / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    local = encode_dataset(
        encode_config(tmp_path / "images", tmp_path / "local"), FakeAutoencoder()
    )
    found = encode_dataset(encode_config("memory://images", tmp_path / "remote"), FakeAutoencoder())
    assert found.fingerprint == local.fingerprint and found.classes == ["class0", "class1"]


def test_problems_of_remote_tars_are_detected_before_the_index(tmp_path: Path) -> None:
    for name, members in {
        "a": tar_sample(0) + tar_sample(1),
        "b": tar_sample(2) + tar_sample(1),
    }.items():
        MEMORY.pipe(f"/twice/{name}.tar", write_tar(tmp_path / f"{name}.tar", members).read_bytes())
    with pytest.raises(
        DataError, match="a key is there twice, in latents-00000-0000-000-4x4.tar and latents-00001"
    ):
        encode_dataset(encode_config("memory://twice", tmp_path / "latents"), FakeAutoencoder())
    with pytest.raises(DataError, match="memory://missing: (no images|cannot be listed)"):
        encode_dataset(encode_config("memory://missing", tmp_path / "other"), FakeAutoencoder())
