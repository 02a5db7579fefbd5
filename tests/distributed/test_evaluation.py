"""One score whatever the number of evaluators, made once and never lost: ranks, rivals, deaths,
checkpoints that come and go.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
import torch

from lpl_pretrain.cli import evaluate as command
from lpl_pretrain.config.load import dump
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.evaluation import evaluator
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.generate import Generator
from lpl_pretrain.runtime.lease import Lease
from tests.support.checkpoints import edit
from tests.support.ranks import run_ranks
from tests.support.tiny_run import color_means_extractor, make_run

CPU = torch.device("cpu")
METRICS = ["fd", "fd_infinity", "kid", "precision_recall", "density_coverage"]
SMALL = {
    "metrics": METRICS,
    "images": 22,
    "guidance_scales": [2.0],
    "bootstrap": 3,
    "kid_subsets": 3,
    "best": "fd_averages",
}
RUN_DEPENDENT = ("seconds", "images_made_now")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluation"), "flow", "rectified_flow")


@pytest.fixture
def run(template):
    for found in ("evaluations", "samples"):
        shutil.rmtree(template.run_dir.path / found, ignore_errors=True)
    return template


@pytest.fixture(autouse=True)
def small_extractor(monkeypatch):
    """Use a small extractor, and one thread as ranks do: rounding depends on the threads."""
    monkeypatch.setattr(evaluator, "load_extractor", color_means_extractor)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values(records):
    return [
        [
            {key: value for key, value in entry.items() if key not in RUN_DEPENDENT}
            for entry in record["results"]
        ]
        for record in records
    ]


def on_a_rank(world, device, run_dir, protocol, keyed_by_rank=False):
    with pytest.MonkeyPatch.context() as patch:
        if keyed_by_rank:
            images = Generator.images
            patch.setattr(
                Generator,
                "images",
                lambda self, indices, *, seed, **more: images(
                    self, indices, seed=seed + world.rank, **more
                ),
            )
        return json.dumps(list(evaluator.evaluate(run_dir, protocol, device, [6], world)))


def alone(run, protocol, steps=None):
    return list(evaluator.evaluate(run.run_dir, protocol, CPU, steps))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_scores(run, world_size):
    (wanted,) = alone(run, run.protocol(**SMALL, name="one"), [6])
    results = run_ranks(world_size, on_a_rank, run.run_dir, run.protocol(**SMALL, name="many"))
    assert len(set(results)) == 1, "all ranks have the same result"
    (got,) = json.loads(results[0])
    assert values([got]) == values([wanted]) and got["processes"] == world_size
    assert [entry["metric"] for entry in got["results"]] == [
        *(
            f"{name}_averages"
            for name in ("fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage")
        )
    ]


def test_has_teeth_noise_keyed_by_rank(run):
    (wanted,) = alone(run, run.protocol(**SMALL, name="one"), [6])
    (got,) = json.loads(
        run_ranks(2, on_a_rank, run.run_dir, run.protocol(**SMALL, name="many"), True)[0]
    )
    assert got["results"][0]["value"] != pytest.approx(wanted["results"][0]["value"], rel=1e-6)


def forked(function):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            function()
            status = 0
        finally:
            os._exit(status)
    return pid


def test_a_killed_evaluator_loses_the_batch_in_flight(run, monkeypatch):
    protocol, put = run.protocol(**SMALL), FeatureStore.put

    def die_at_the_third(store, batch, tensors):
        if batch.start == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        put(store, batch, tensors)

    def doomed():
        alone(run, protocol, [3])  # real images are read and kept
        FeatureStore.put = die_at_the_third
        alone(run, protocol, [6])

    os.waitpid(forked(doomed), 0)
    lease = run.run_dir.evaluation_lease(6, "tiny")
    assert lease.exists()
    (record,) = alone(run, protocol)
    assert {entry["images_made_now"] for entry in record["results"]} == {22 - 8}
    (wanted,) = alone(run, run.protocol(**SMALL, name="whole"), [6])
    assert values([record]) == values([wanted])
    assert not list(run.run_dir.path.rglob("*.partial")) and not lease.exists()


def test_rivals_score_every_checkpoint_once(run, tmp_path):
    """Three evaluators at once, which all find the real images unread; what each has done it
    writes down.
    """
    protocol = run.protocol(**SMALL)

    def score_all(number):
        done = [record["step"] for record in evaluator.evaluate(run.run_dir, protocol, CPU)]
        (tmp_path / f"{number}.json").write_text(json.dumps(done))

    pids = [forked(lambda number=number: score_all(number)) for number in range(3)]
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    done = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert sorted(step for steps in done for step in steps) == [3, 6]
    assert alone(run, protocol) == []


def test_a_checkpoint_that_is_gone_is_passed_over(run, monkeypatch):
    folder, aside = run.run_dir.checkpoint(3), run.run_dir.path / "aside"
    enter = Lease.__enter__

    def vanish(lease):
        if folder.exists():
            folder.rename(aside)
        return enter(lease)

    monkeypatch.setattr(Lease, "__enter__", vanish)
    try:
        assert [record["step"] for record in alone(run, run.protocol(**SMALL))] == [6]
    finally:
        aside.rename(folder)


def test_watch_waits_for_checkpoints_and_ends_with_training(run, tmp_path):
    file, folder, aside = tmp_path / "protocol.yaml", run.run_dir.checkpoint(6), tmp_path / "aside"
    file.write_text(dump(run.protocol(**SMALL)))
    folder.rename(aside)
    pid = forked(
        lambda: command.run(str(run.run_dir.path), str(file), [], None, watch=True, poll_s=0.1)
    )
    first, second = (run.run_dir.evaluation(step, "tiny") for step in (3, 6))
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0), "training goes on"
    aside.rename(folder)
    assert os.waitpid(pid, 0)[1] == 0 and second.exists()


def meets_damage(world, device, run_dir, protocol):
    """Scored steps, problems of the others, and the error on every rank for a named step."""
    passed_over: dict[int, str] = {}
    records = list(
        evaluator.evaluate(run_dir, protocol, device, None, world, passed_over=passed_over)
    )
    with pytest.raises(CheckpointError) as caught:
        list(evaluator.evaluate(run_dir, protocol, device, [3], world))
    return [record["step"] for record in records], list(passed_over.items()), str(caught.value)


def test_damage_is_known_to_all_ranks(run, tmp_path):
    """No rank waits for one that has raised the error."""
    folder, aside = run.run_dir.checkpoint(3), tmp_path / "aside"
    shutil.copytree(folder, aside)
    edit(folder, "manifest.json", lambda content: content.update(optimizer_steps=-1))
    try:
        results = run_ranks(2, meets_damage, run.run_dir, run.protocol(**SMALL, name="damaged"))
    finally:
        shutil.rmtree(folder)
        shutil.copytree(aside, folder)
    assert results[0] == results[1]
    steps, passed_over, refusal = results[0]
    assert steps == [6] and passed_over[0][0] == 3 and refusal.startswith(passed_over[0][1])
