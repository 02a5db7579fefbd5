"""Preflight with four ranks on two simulated nodes: all begin training, or none does."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed

from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError, PreflightError
from lpl_pretrain.preflight import run as preflight
from lpl_pretrain.preflight.node_report import inspect_node
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks

DEFECTS = {
    "none": (set(), {}),
    "data": ({2, 3}, {"shard_problem": "gone"}),
    "device": ({0}, {"device_problem": "1 wrong number"}),
    "rank 0 cannot write": ({0, 1}, {"run_dir_problem": "read-only"}),
    "code": ({2, 3}, {"code": "f" * 64}),
    "disk": ({0, 1, 2, 3}, {"free_gib": 0.0}),
    "in use": ({0}, {"in_use": "it is being trained by process 1 on x"}),
    "refusal": ({2, 3}, {}),
    "all refuse": ({0, 1, 2, 3}, {}),
    "off": ({2, 3}, {"shard_problem": "gone"}),
}


class ProcessEnded(BaseException):
    """Raised instead of ending the process."""


def end_process(status):
    raise ProcessEnded(status)


def result_of_preflight(world, device, folder, latents, name):
    """`began`, the exit status, or the error's status and check."""
    ranks, changes = DEFECTS[name]
    config, run_dir = (
        train_config(**({"preflight": None} if name == "off" else {})),
        RunDir(folder / name),
    )
    store = torch.distributed.FileStore(str(folder / f"{name} store"), world.world_size)
    preflight.dist = SimpleNamespace(rendezvous_store=lambda world: store, exit=end_process)

    def inspect_with_defect(*arguments):
        report = replace(inspect_node(*arguments), host="ab"[world.rank // 2])
        return replace(report, **changes) if world.rank in ranks else report

    preflight.inspect_node = inspect_with_defect
    try:
        if "refus" in name and world.rank in ranks:
            preflight.report_refusal(config, run_dir, world, ConfigError("no"))
            return "refused by all"
        preflight.run_preflight(
            config, run_dir, world, read_data(latents), lambda store=None: device
        )
        return "began"
    except ProcessEnded as ended:
        return ended.args[0]
    except PreflightError as error:
        return f"{error.status}: {str(error).split(':')[1].strip()}"


def all_cases(world, device, folder, latents):
    return {name: result_of_preflight(world, device, folder, latents, name) for name in DEFECTS}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    latents, _ = tiny_dataset(folder, 8)
    by_rank = run_ranks(4, all_cases, folder, latents)
    return folder, {name: [result[name] for result in by_rank] for name in DEFECTS}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("none", ["began"] * 4),
        ("data", [0, 0, 75, 75]),
        ("device", [75, 75, 0, 0]),
        ("rank 0 cannot write", [75, 75, 0, 0]),
        ("code", ["2: code"] * 4),
        ("disk", ["1: disk"] * 4),
        ("in use", ["2: run"] * 4),
        ("refusal", [0, 0, 75, 75]),
        ("all refuse", ["refused by all"] * 4),
        ("off", ["began"] * 4),
    ],
)
def test_all_ranks_end_alike(results, name, wanted):
    """Ranks of an unfit node exit with UNFIT; the last case is without a preflight."""
    assert results[1][name] == wanted
    assert RunDir(results[0] / name).preflight.exists() == (name == "none" or 75 in wanted), (
        "nothing is written to a full disk"
    )


def test_preflight_json_lists_ranks_and_bandwidths(results):
    folder, _ = results
    report = json.loads(RunDir(folder / "none").preflight.read_text())
    assert [(rank["rank"], rank["host"]) for rank in report["ranks"]] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    assert [(bandwidth["host"], bandwidth["ranks"]) for bandwidth in report["links"]] == [
        ("a", [0, 1]),
        ("b", [2, 3]),
    ]
    assert (
        all(bandwidth["mib_per_s"] > 0 for bandwidth in report["links"])
        and report["findings"] == []
    )
    assert all(abs(rank["clock_s"]) <= rank["clock_accuracy_s"] for rank in report["ranks"]), (
        "one machine has one clock"
    )


@pytest.mark.parametrize(
    ("name", "host", "check"), [("data", "b", "data"), ("rank 0 cannot write", "a", "run folder")]
)
def test_node_that_cannot_write_is_in_preflight_json(results, name, host, check):
    (finding,) = json.loads(RunDir(results[0] / name).preflight.read_text())["findings"]
    assert (finding["host"], finding["check"], finding["fault"]) == (host, check, "node")
