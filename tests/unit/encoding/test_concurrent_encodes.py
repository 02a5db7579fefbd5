"""Concurrent encodes: the folder belongs to one configuration, and is complete and sound, whichever
process is faster.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.encoding import encode as encode_module
from lpl_pretrain.encoding import plan_file, writer
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.encoding.plan import Plan, make_plan
from lpl_pretrain.encoding.plan_file import create_plan_file
from lpl_pretrain.encoding.publish import publish_new
from lpl_pretrain.encoding.shard_checks import check_shards
from lpl_pretrain.encoding.writer import RECORDS
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.world import World
from tests.support.image_tars import FakeAutoencoder, encode_config, encode_dataset, image_tar

ROUNDS = 400
PLANS = [Plan(letter * 64, []) for letter in "ab"]


def together(*calls: Callable[[], object]) -> list[object]:
    """Results or exceptions of the calls, each on its own thread."""
    results: list[object] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def race(folder: Path, monkeypatch: pytest.MonkeyPatch, link: Callable[[Path, Path], None]) -> int:
    """Number of rounds, of ROUNDS, in which two plans both got one folder; both threads wait for
    each other before the last step.
    """
    barrier = threading.Barrier(2)

    def meet_and_link(before: Path, after: Path) -> None:
        barrier.wait(30)
        link(before, after)

    both = 0
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "link", meet_and_link)
        for number in range(ROUNDS):
            output = folder / str(number)
            results = together(
                *(lambda plan=plan, output=output: create_plan_file(output, plan) for plan in PLANS)
            )
            refusals = [result for result in results if isinstance(result, DataError)]
            assert all(result is None or result in refusals for result in results), results
            assert (output / RECORDS / "plan.txt").read_text() in ("a" * 64, "b" * 64)
            both += not refusals
    return both


def test_one_of_two_plans_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert race(tmp_path, monkeypatch, os.link) == 0


def test_has_teeth_in_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan file that is overwritten lets both plans find their own in every round."""
    lock, first_of, real = threading.Lock(), dict[Path, threading.Event](), plan_file.check_plan

    def write_over(before: Path, after: Path) -> None:
        with lock:
            is_first = after not in first_of
            has_looked = first_of.setdefault(after, threading.Event())
        if not is_first:
            has_looked.wait(30)
        os.replace(before, after)

    def look(folder: Path, plan: Plan) -> None:
        real(folder, plan)
        first_of[folder / RECORDS / "plan.txt"].set()

    monkeypatch.setattr(plan_file, "check_plan", look)
    assert race(tmp_path, monkeypatch, write_over) == ROUNDS


def test_one_of_two_plans_gets_the_folder_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(before: Path, after: Path) -> None:
        raise OSError(95, "Operation not supported")

    assert race(tmp_path, monkeypatch, no_links) == 0


def test_publish_new_keeps_an_existing_file(tmp_path: Path) -> None:
    assert publish_new(tmp_path / "x", [b"a", b"b"]) and not publish_new(tmp_path / "x", [b"c"])
    assert (tmp_path / "x").read_bytes() == b"ab" and [
        path.name for path in tmp_path.iterdir()
    ] == ["x"]
    with pytest.raises(FileNotFoundError):
        publish_new(tmp_path / "gone" / "x", [b"a"])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def sound(folder: Path) -> None:
    index = read_index(folder)
    assert not [problem for check in check_shards(folder, index) for problem in check.problems]
    assert not (folder / RECORDS).exists()


def test_two_configurations_at_once(tmp_path: Path) -> None:
    """One of two complete encodes is refused, at any time, and the folder belongs to the other."""
    source = image_tar(tmp_path / "x.tar", 6)
    alone = []
    for crop in ("center", "random"):
        encode_dataset(
            encode_config(source, tmp_path / crop, shard_samples=2, crop=crop), FakeAutoencoder()
        )
        alone.append(contents(tmp_path / crop))
    for trial in range(8):
        output = tmp_path / f"both{trial}"
        configs = [
            encode_config(source, output, shard_samples=2, crop=crop)
            for crop in ("center", "random")
        ]
        results = together(
            *(lambda config=config: encode(config, FakeAutoencoder()) for config in configs)
        )
        refusals = [result for result in results if isinstance(result, DataError)]
        assert len(refusals) == 1, results
        assert "holds the unfinished work of other inputs" in str(
            refusals[0]
        ) or "made from other inputs" in str(refusals[0])
        assert contents(output) == alone[results.index(refusals[0]) ^ 1]
        sound(output)


class SlowRoundingAutoencoder(FakeAutoencoder):
    """Waits at random, so that two encodes overlap at every offset, and rounds differently, as
    another device would.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.noise = random.Random(seed), 1e-3 * seed

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.random.uniform(0, 0.01))
        return super().encode_moments(images) + self.noise


@pytest.mark.parametrize("trial", range(12))
def test_one_command_started_twice_gives_one_sound_folder(tmp_path: Path, trial: int) -> None:
    source = image_tar(tmp_path / "x.tar", 12)
    config = encode_config(source, tmp_path / "latents", shard_samples=3, batch_size=2, flips=True)
    offset = random.Random(trial).uniform(0, 0.1) * (trial > 2)

    def second() -> object:
        time.sleep(offset)
        return encode(config, SlowRoundingAutoencoder(trial % 3))

    results = together(lambda: encode(config, SlowRoundingAutoencoder(0)), second)
    assert not [result for result in results if isinstance(result, BaseException)], results
    sound(tmp_path / "latents")
    assert len({index.digest for index in results}) == 1  # type: ignore[attr-defined]
    if trial % 3 == 0:
        encode_dataset(
            encode_config(source, tmp_path / "alone", shard_samples=3, batch_size=2, flips=True),
            FakeAutoencoder(),
        )
        assert contents(tmp_path / "latents") == contents(tmp_path / "alone")


def test_the_first_record_of_a_part_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process with other rounding finishes a part just before the first records it."""
    source = image_tar(tmp_path / "x.tar", 4)
    config = encode_config(source, tmp_path / "latents", shard_samples=2)
    real, rivals = writer.publish_new, []

    def rival_first(path: Path, pieces: list[bytes]) -> bool:
        if path.name == "part-00000-0000.json" and not rivals:
            rivals.append(path)
            assert encode(config, FakeAutoencoder(), world=World(0, 0, 2)) is None
        return real(path, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "publish_new", rival_first)
        encode(config, SlowRoundingAutoencoder(5), world=World(0, 0, 2))
    assert rivals
    encode_dataset(config, FakeAutoencoder())
    sound(tmp_path / "latents")
    encode_dataset(encode_config(source, tmp_path / "alone", shard_samples=2), FakeAutoencoder())
    assert contents(tmp_path / "latents") == contents(tmp_path / "alone")


def test_a_folder_that_is_finished_meanwhile_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan finishes between our check for an index and our plan file."""
    source, output = image_tar(tmp_path / "x.tar", 4), tmp_path / "latents"
    real = encode_module.create_plan_file

    def other_first(folder: Path, plan: Plan) -> None:
        monkeypatch.setattr(encode_module, "create_plan_file", real)
        encode_dataset(encode_config(source, output, crop="random"), FakeAutoencoder())
        real(folder, plan)

    monkeypatch.setattr(encode_module, "create_plan_file", other_first)
    with pytest.raises(
        DataError,
        match="holds a data set made from other inputs .crop 'random' there, 'center' now",
    ):
        encode(encode_config(source, output), FakeAutoencoder())
    sound(output)


def test_corrupt_records_and_other_plans_are_refused_before_the_index(tmp_path: Path) -> None:
    source, output = image_tar(tmp_path / "x.tar", 6), tmp_path / "latents"
    config = encode_config(source, output, shard_samples=2)

    def begun() -> list[Path]:
        assert encode(config, FakeAutoencoder(), world=World(0, 0, 2)) is None
        return sorted((output / RECORDS).glob("part-*.json"))

    record = begun()[0]
    whole = json.loads(record.read_text())
    for change, fragment in (
        ({"plan": "b" * 64}, "belongs to plan bbbbbbbbbbbb"),
        ({"staging": "../../x"}, "names files of other parts"),
        ({"samples": "many"}, "corrupt"),
    ):
        record.write_text(json.dumps(whole | change))
        with pytest.raises(
            DataError,
            match=f"part-00000-0000.json: {fragment}.*remove .*run the same command again",
        ):
            encode(config, FakeAutoencoder())
    for name in ("../../stolen.tar", "latents-00000-0001-000-4x4.tar"):
        copied = json.loads(json.dumps(whole))
        copied["shards"][0][1]["file"] = name
        record.write_text(json.dumps(copied))
        with pytest.raises(DataError, match="names files of other parts"):
            encode(config, FakeAutoencoder())
    record.write_text(json.dumps(whole))
    (output / RECORDS / "plan.txt").write_text("c" * 64)
    with pytest.raises(
        DataError, match="holds the unfinished work of other inputs .plan cccccccccccc there"
    ):
        encode(config, FakeAutoencoder())
    assert not (output / "index.json").exists()


def test_files_are_moved_after_a_kill_between_a_record_and_the_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image_tar(tmp_path / "x.tar", 6)
    config = encode_config(source, tmp_path / "latents", shard_samples=2)

    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(writer, "move_shards", kill)
        patch.setattr(writer.PartWriter, "discard", lambda self: None)  # a kill cleans nothing up
        with pytest.raises(Killed):
            encode(config, FakeAutoencoder())
    assert not list((tmp_path / "latents").glob("latents-*"))
    encode_dataset(config, FakeAutoencoder())
    sound(tmp_path / "latents")


@pytest.mark.parametrize("suffix", [".tar", ".offsets.safetensors"])
def test_files_are_moved_after_a_failed_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The record lists the files: those that are not moved yet must not be discarded after the
    error.
    """
    source, output = image_tar(tmp_path / "x.tar", 6), tmp_path / "latents"
    config, replace, refused_names = (
        encode_config(source, output, shard_samples=2),
        os.replace,
        list[str](),
    )

    def refused(source: Path, target: Path) -> None:
        if target.parent == output and target.name.endswith(suffix) and not refused_names:
            refused_names.append(target.name)
            raise OSError(116, "Stale file handle", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", refused)
        with pytest.raises(DataError, match="Stale file handle"):
            encode(config, FakeAutoencoder())
    assert not (output / refused_names[0]).exists()
    encode_dataset(config, FakeAutoencoder())
    sound(output)


def test_shards_of_an_earlier_data_set_are_removed(tmp_path: Path) -> None:
    source, output = image_tar(tmp_path / "x.tar", 6), tmp_path / "latents"
    encode_dataset(encode_config(source, output, shard_samples=2), FakeAutoencoder())
    (output / "latents-notes.txt").write_text("not ours")
    (output / "index.json").unlink()
    index = encode_dataset(encode_config(source, output), FakeAutoencoder())
    assert (
        len(index.shards) == 1
        and len(list(output.glob("latents-0*.tar"))) == 1
        and (output / "latents-notes.txt").exists()
    )
    sound(output)


def test_the_error_names_an_earlier_version(tmp_path: Path) -> None:
    source, output = image_tar(tmp_path / "x.tar", 2), tmp_path / "latents"
    config = encode_config(source, output)
    earlier = make_plan(config, {"autoencoder": "fake"}).earlier_identity
    create_plan_file(output, Plan(earlier, []))
    with pytest.raises(
        DataError, match="unfinished work of an earlier version, which ignored colour profiles"
    ):
        encode(config, FakeAutoencoder())
