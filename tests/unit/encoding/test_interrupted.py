"""Encodes that are killed at any moment, with one process or several, and started again: the folder
equals that of an uninterrupted run byte for byte.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.world import World
from tests.support.image_tars import (
    FakeAutoencoder,
    encode_config,
    encode_dataset,
    image_tar,
    tar_sample,
    write_tar,
)

NUM_IMAGES, PARTS = 24, 8


class SlowAutoencoder(FakeAutoencoder):
    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return super().encode_moments(images)


def slow_config(source: Path | list[str], output: Path, **options: object) -> EncodeConfig:
    return encode_config(source, output, shard_samples=3, batch_size=2, flips=True, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def start(config: EncodeConfig, world: World | None = None) -> int:
    """`encode` in a forked process, as one rank."""
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)
    try:
        os.setsid()
        encode(config, SlowAutoencoder(), world=world)
        os._exit(0)
    finally:
        os._exit(1)


def kill(pid: int) -> bool:
    """True when it was still running."""
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def finish(config: EncodeConfig, world: World | None = None) -> None:
    assert os.waitpid(start(config, world), 0)[1] == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], float]:
    """(source, files of an uninterrupted run, its seconds)"""
    folder = tmp_path_factory.mktemp("whole")
    source = image_tar(folder / "images.tar", NUM_IMAGES)
    started = time.monotonic()
    finish(slow_config(source, folder / "latents"))
    return source, contents(folder / "latents"), time.monotonic() - started


@pytest.mark.parametrize("trial", range(20))
def test_kill_at_a_random_moment(uninterrupted, tmp_path: Path, trial: int) -> None:
    source, whole, seconds = uninterrupted
    config = slow_config(source, tmp_path / "latents")
    worlds = [None] if trial % 2 else [World(0, 0, 2), World(1, 1, 2)]
    pids = [start(config, world) for world in worlds]
    time.sleep(random.Random(trial).uniform(0, seconds / len(worlds)))
    for pid in pids:
        kill(pid)
    before = {
        name: path.stat().st_mtime_ns
        for name in whole
        if (path := tmp_path / "latents" / name).exists()
    }
    finish(config)
    assert contents(tmp_path / "latents") == whole
    redone = [
        name
        for name, then in before.items()
        if (tmp_path / "latents" / name).stat().st_mtime_ns != then
    ]
    assert len(redone) <= 2 * len(
        worlds
    )  # tar and offsets of the part that each process was working on


def test_kills_land_in_the_middle(uninterrupted, tmp_path: Path) -> None:
    """Kills of the trials above come while some parts are recorded and some are not."""
    source, _, seconds = uninterrupted
    config = slow_config(source, tmp_path / "latents")
    pid = start(config)
    deadline = time.monotonic() + 20 * seconds
    while (
        not list((tmp_path / "latents").glob(".encode/part-*.json")) and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    assert kill(pid)
    assert 0 < len(list((tmp_path / "latents").glob(".encode/part-*.json"))) < PARTS
    assert not (tmp_path / "latents" / "index.json").exists()


@pytest.mark.parametrize("ranks", [2, 3, 5, 11])
def test_any_number_of_processes_makes_the_same_folder(
    uninterrupted, tmp_path: Path, ranks: int
) -> None:
    source, whole, _ = uninterrupted
    config = slow_config(source, tmp_path / "latents")
    results = [
        encode(config, FakeAutoencoder(), world=World(rank, rank, ranks)) for rank in range(ranks)
    ]
    assert [index is None for index in results[: min(ranks, PARTS) - 1]] == [True] * (
        min(ranks, PARTS) - 1
    )
    assert results[-1] is not None and contents(tmp_path / "latents") == whole


def test_processes_at_once(uninterrupted, tmp_path: Path) -> None:
    source, whole, _ = uninterrupted
    config = slow_config(source, tmp_path / "latents")
    pids = [start(config, World(rank, rank, 3)) for rank in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert contents(tmp_path / "latents") == whole


def test_has_teeth(uninterrupted, tmp_path: Path) -> None:
    """A record, written after its shards, is trusted: a wrong one is not detected; without it the
    shards are encoded again.
    """
    source, whole, _ = uninterrupted
    config, folder = slow_config(source, tmp_path / "latents"), tmp_path / "latents"
    assert encode(config, FakeAutoencoder(), world=World(0, 0, 2)) is None
    next(folder.glob("latents-00000-0000-*.tar")).write_bytes(b"half a shard")
    encode_dataset(config, FakeAutoencoder())
    assert contents(folder) != whole
    (folder / "index.json").unlink()
    encode_dataset(config, FakeAutoencoder())
    assert contents(folder) == whole


def test_killed_between_the_index_and_the_records(uninterrupted, tmp_path: Path) -> None:
    source, whole, _ = uninterrupted
    config = slow_config(source, tmp_path / "latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        encode_dataset(config, FakeAutoencoder())
    assert (tmp_path / "latents" / ".encode").exists()
    encode_dataset(config, FakeAutoencoder())
    assert contents(tmp_path / "latents") == whole


def test_another_configuration_does_not_go_on(uninterrupted, tmp_path: Path) -> None:
    source, _, _ = uninterrupted
    output = tmp_path / "latents"
    assert encode(slow_config(source, output), FakeAutoencoder(), world=World(0, 0, 2)) is None
    for other in (
        slow_config(source, output, crop="random"),
        slow_config(image_tar(tmp_path / "x.tar", 5), output),
    ):
        with pytest.raises(DataError, match="holds the unfinished work of other inputs"):
            encode(other, FakeAutoencoder(), world=World(1, 1, 2))

    class Other(FakeAutoencoder):
        identity = "other"

    with pytest.raises(DataError, match="holds the unfinished work of other inputs"):
        encode(slow_config(source, output), Other(), world=World(1, 1, 2))


def test_a_full_disk_keeps_finished_parts(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole, _ = uninterrupted
    config = slow_config(source, tmp_path / "latents")
    written = []

    def full(path: Path, mode: str) -> object:
        written.append(path)
        if len(written) == 8:
            raise OSError(28, "No space left on device")
        return open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr("lpl_pretrain.encoding.publish.open", full, raising=False)
        with pytest.raises(
            DataError,
            match="No space left on device while writing .* MiB: free disk space and run the same",
        ):
            encode(config, FakeAutoencoder())
    assert len(list((tmp_path / "latents").glob(".encode/part-*.json"))) == 2
    assert not list((tmp_path / "latents").glob(".latents*")) and not list(
        (tmp_path / "latents").glob(".encode/0*")
    )
    encode_dataset(config, FakeAutoencoder())
    assert contents(tmp_path / "latents") == whole


def test_repeated_keys_and_contradicting_classes_of_two_parts(tmp_path: Path) -> None:
    """Repeated keys of local sources are detected before anything is encoded."""
    tars = [
        write_tar(tmp_path / f"{i}.tar", tar_sample(number)) for i, number in enumerate((1, 2, 1))
    ]
    config = encode_config([str(tar) for tar in tars], tmp_path / "latents")
    with pytest.raises(
        DataError,
        match="2.tar:p0001.png: key 'p0001' is there twice over all sources .also "
        ".*0.tar:p0001.png",
    ):
        encode(config, FakeAutoencoder(), world=World(0, 0, 2))
    assert not (tmp_path / "latents").exists()
