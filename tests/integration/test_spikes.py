"""`train` on a poisoned shard: rollbacks, the audit of their samples, and their report."""

from __future__ import annotations

import pytest

from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from tests.support.commands import lpl, metric_lines
from tests.support.spikes import STEPS, poisoned_data, spike_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spikes")
    config = spike_config(poisoned_data(folder), "rollback")
    (folder / "train.yaml").write_text(dump(config))
    return folder


def test_train_audit_and_report(folder):
    run = folder / "run"
    stderr = lpl("train", folder / "train.yaml", f"run_dir={run}").stderr
    assert (
        "step 11: the loss at t " in stderr
        and "rolled back to step 8, 3 updates jumped over in all (1 of at most 20)" in stderr
    )
    assert RunDir(run).complete_checkpoints()[-1] == STEPS
    spikes = [line for line in metric_lines(run) if line.get("event") == "spike"]
    assert [(line["step"], line["action"], line["to_step"]) for line in spikes] == [
        (11, "rollback", 8),
        (14, "rollback", 12),
    ]
    audited = lpl("audit", run).stdout
    assert f"{STEPS} updates of 8 samples, 3 starts, 5 updates repeated after one" in audited
    assert (
        "2 of the starts are rollbacks after a spike; the samples of 5 updates were jumped over"
        in audited
    )
    lpl("report", run)
    page = RunDir(run).report.read_text()
    for line in spikes:
        assert f"to_step = {line['to_step']}, jump_updates = {line['jump_updates']}" in page
        assert line["samples"][0] in page
    assert "latents-00000-0005-000-8x8.tar row" in page


def test_stop_is_an_error_that_names_samples(folder):
    run = folder / "stopped"
    ended = lpl(
        "train", folder / "train.yaml", f"run_dir={run}", "optimizer.on_spike=stop", check=False
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert (
        "largest losses: sample " in ended.stderr
        and "optimizer.on_spike=skip leaves such updates out" in ended.stderr
    )
    again = lpl("train", folder / "train.yaml", f"run_dir={run}", "optimizer.on_spike=skip")
    assert (
        "resumed at step 8" in again.stderr and "update left out (1 of at most 20)" in again.stderr
    )
