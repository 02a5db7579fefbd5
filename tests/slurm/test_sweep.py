"""A sweep on a real SLURM cluster: a requeued task of the array does not affect the others."""

from __future__ import annotations

import sys

from launch.job_folder import JobFolder
from lpl_pretrain.config.rundir import RunDir
from tests.support.commands import ROOT, lpl, metric_lines

STEPS = 800
RATES = ("1e-3", "2e-3", "4e-3")


def test_requeued_task_resumes_its_own_run(cluster, folder):
    """The last task has the array's own number, by which all three would be requeued."""
    sweep = folder / "sweep"

    def launch(*arguments):
        return cluster.run(
            sys.executable, "-m", "launch", *map(str, arguments), check=False, cwd=ROOT
        )

    shape = [
        "--cluster",
        folder / "cluster.yaml",
        "--set",
        "processes_per_node=1",
        "--set",
        "gpus_per_node=1",
    ]
    overrides = [f"run_dir={sweep}", f"steps={STEPS}", "checkpoint.every_steps=400", "lpl=null"]
    swept = ["--sweep", f"optimizer.lr={','.join(RATES)}"]
    sent = launch("train", folder / "train.yaml", *overrides, *swept, *shape)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    runs = [sweep / f"optimizer.lr={rate}" for rate in RATES]
    jobs = [JobFolder(run / "launch").job for run in runs]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_{number}" for number in range(3)]

    def done(run):
        return [attempt["reason"] for attempt in JobFolder(run / "launch").read_attempts()][
            -1:
        ] == ["done"]

    def steps(run):
        return (
            [line["step"] for line in metric_lines(run) if "event" not in line]
            if RunDir(run).metrics.exists()
            else []
        )

    assert f"JobId={array} " in cluster.run("scontrol", "show", "job", jobs[2], "--oneliner").stdout
    cluster.wait(lambda: len(steps(runs[2])) >= 20, 60, "the first steps of the last run")
    cluster.run("scontrol", "requeue", jobs[2])
    table = launch("status", sweep).stdout.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        [run.name, job] for run, job in zip(runs, jobs)
    ]
    cluster.wait(lambda: all(map(done, runs)), 100, "the end of all runs")
    for run in runs:
        assert RunDir(run).complete_checkpoints()[-1] == STEPS and sorted(set(steps(run))) == list(
            range(1, STEPS + 1)
        )
        assert f"{run}: complete" in launch("logs", run).stdout
    attempts = [JobFolder(run / "launch").read_attempts() for run in runs]
    assert [len(of_run) for of_run in attempts] == [1, 1, 2] and attempts[2][0][
        "reason"
    ] == "stopped in time"
    assert "are complete" in launch("resume", sweep).stderr
    lpl("report", sweep)
    page = (sweep / "comparison.html").read_text()
    assert "comparison of 3 runs" in page and all(
        f"lr {float(rate):g}</span>" in page for rate in RATES
    )
