"""The commands end to end on 32 pictures: encode, train, stop, go on, sample, evaluate, report; and
what bad input gets.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.runtime.lease import Lease
from tests.support.commands import ROOT, logged_losses, lpl, metric_lines


def weights(run, step, kind="param"):
    tensors = {}
    for file in sorted((run / "checkpoints" / f"step_{step:08d}").glob("pieces_*.safetensors")):
        tensors |= {
            f"{file.name}/{name}": x for name, x in load_file(file).items() if name.startswith(kind)
        }
    assert tensors
    return tensors


def test_a_run_leaves_what_the_readme_promises(world):
    run = world / "whole"
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "logs"} <= {
        p.name for p in run.iterdir()
    }
    assert list(logged_losses(run)) == list(range(1, 9))
    events = [line["event"] for line in metric_lines(run) if "event" in line]
    assert events == ["lpl_weight_calibrated"]
    last = metric_lines(run)[-1]
    assert (
        0 < last["lpl/weighted_share"] < 1 and last["lpl/gated_share"] > 0 and last["grad_norm"] > 0
    )
    assert last["seconds/lpl"] > 0 and [path.name for path in sorted((run / "lpl").iterdir())] == [
        "step_00000004.png",
        "step_00000008.png",
    ]
    (start,) = json.loads((run / "provenance.json").read_text())
    assert (
        start["world_size"] == 1
        and start["versions"]["torch"]
        and start["step"] == 0
        and start["strategy"] == "local"
    )


def test_resuming_equals_not_stopping_bit_for_bit(world):
    run = world / "parts"
    lpl("train", world / "train.yaml", f"run_dir={run}", "steps=5", "checkpoint.every_steps=3")
    shutil.rmtree(
        run / "checkpoints" / "step_00000005"
    )  # as if it had stopped while LPL's weight was being calibrated
    lpl("train", world / "train.yaml", f"run_dir={run}")
    assert logged_losses(run) == logged_losses(world / "whole")
    for kind in ("param", "ema", "optimizer"):
        ours, theirs = weights(run, 8, kind), weights(world / "whole", 8, kind)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_run_is_trained_by_one_at_a_time(world):
    run = world / "held"
    with Lease(RunDir(run).live) as lease:
        assert lease.held
        refused = lpl("train", world / "train.yaml", f"run_dir={run}", check=False)
    assert (
        refused.returncode == 2 and f"is being trained by process {os.getpid()}" in refused.stderr
    )
    assert not (run / "metrics.jsonl").exists()


def test_a_training_ends_when_the_run_is_another_ones(world):
    """It was suspended, say, and its job was begun again elsewhere."""
    run = world / "lost"
    command = [
        sys.executable,
        "-m",
        "lpl_pretrain",
        "train",
        str(world / "train.yaml"),
        f"run_dir={run}",
        "steps=100000",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as ghost:
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        mine = run / "mine.lease"
        mine.write_text(json.dumps({"token": "another"}))
        os.rename(mine, RunDir(run).live)
        told = ghost.communicate(timeout=60)[1]
    assert ghost.returncode == 1 and "is being trained by another process now" in told


def test_scores_while_training_waits(world):
    """On two ranks, of every checkpoint, and the run is the same as without; one that cannot run is
    refused at once.
    """
    run = world / "inline"
    lpl(
        "train",
        world / "train.yaml",
        f"run_dir={run}",
        "parallel.strategy=ddp",
        f"inline_evaluation={world}/quick.yaml",
        ranks=2,
    )
    assert sorted(path.parent.name for path in run.glob("evaluations/*/quick.json")) == [
        "step_00000004",
        "step_00000008",
    ]
    assert logged_losses(run) == pytest.approx(logged_losses(world / "whole"), rel=1e-4)
    record = json.loads((run / "evaluations/step_00000008/quick.json").read_text())
    assert record["processes"] == 2 and {entry["images"] for entry in record["results"]} == {12}
    (world / "unfit.yaml").write_text((world / "quick.yaml").read_text().replace("euler", "ddim"))
    refused = lpl(
        "train",
        world / "train.yaml",
        f"run_dir={world}/no",
        f"inline_evaluation={world}/unfit.yaml",
        check=False,
    )
    assert (
        refused.returncode == 2
        and "sampler.kind=ddim" in refused.stderr
        and not (world / "no").exists()
    )


def test_has_teeth_another_seed_is_another_run(world):
    """And, in the same launch: wandb mirrors metrics.jsonl, offline; a ramp without an end is named
    once, at the start.
    """
    changes = ["steps=5", "seed=1", "lpl.ramp_steps=4", "log.wandb.mode=offline"]
    said = lpl("train", world / "train.yaml", f"run_dir={world}/seed", *changes).stderr
    assert (
        said.count(
            "lpl.ramp_steps=4 from step 4 on with steps=5: the weight of LPL reaches 25% of its "
            "value only"
        )
        == 1
    )
    assert logged_losses(world / "seed")[1] != logged_losses(world / "whole")[1]
    assert list((world / "seed").glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["parallel.strategy=fsdp2"],
        ["parallel.strategy=zero", "parallel.zero_config=configs/zero/zero2.json"],
    ],
    ids=["fsdp2", "zero2"],
)
def test_two_ranks_stopped_by_a_real_sigterm_go_on(world, arguments):
    """torchrun passes SIGTERM on; both ranks save at the same step and the same command goes on,
    and equals one process.
    """
    run = world / f"two_{arguments[0].split('=')[1]}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lpl_pretrain",
        "train",
        str(world / "train.yaml"),
        f"run_dir={run}",
        "steps=100000",
        *arguments,
    ]
    trainer = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(logged_losses(run)) >= 6):
        assert trainer.poll() is None and time.monotonic() < deadline, trainer.stderr.read()
        time.sleep(0.1)
    trainer.send_signal(signal.SIGTERM)
    trainer.communicate(timeout=60)
    stopped = [line for line in metric_lines(run) if line.get("event") == "stopped"]
    assert len(stopped) == 1 and stopped[0]["signal"] == "SIGTERM"
    step = stopped[0]["step"]
    assert (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
    lpl(
        "train",
        world / "train.yaml",
        f"run_dir={run}",
        f"steps={step + 2}",
        *arguments,
        ranks=2,
        cold=True,
    )
    assert [line["step"] for line in metric_lines(run) if line.get("event") == "resumed"] == [step]
    assert max(logged_losses(run)) == step + 2
    audited = lpl("audit", run).stdout
    assert (
        f"{step + 2} updates of 8 samples, 2 starts, 0 updates repeated" in audited
        and "none was read twice" in audited
    )
    whole = logged_losses(world / "whole")
    assert [logged_losses(run)[s] for s in range(1, 7)] == pytest.approx(
        [whole[s] for s in range(1, 7)], rel=2e-4
    )


@pytest.mark.parametrize("moment", ["at the start", "while compiling"])
def test_a_signal_before_the_first_step_is_kept_for_its_end(world, moment):
    """One update is made, saved, and gone on from."""
    run = world / moment
    command = [
        sys.executable,
        "-m",
        "lpl_pretrain",
        "train",
        str(world / "train.yaml"),
        f"run_dir={run}",
        "lpl=null",
    ]
    command += ["parallel.compile=true"] * (moment == "while compiling")
    trainer = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (
        run / ("live.lease" if moment == "at the start" else "logs/samples_rank_00000.jsonl")
    ).exists():
        assert trainer.poll() is None and time.monotonic() < deadline, trainer.stderr.read()
        time.sleep(0.02)
    assert not (run / "metrics.jsonl").exists() or not logged_losses(run)
    trainer.send_signal(signal.SIGUSR2)
    said = trainer.communicate(timeout=120)[1]
    assert trainer.returncode == 0 and "SIGUSR2: stopped after step 1 of 8" in said, said
    assert RunDir(run).complete_checkpoints() == [1]


def test_a_sample_that_was_missed_is_found(world):
    shutil.copytree(world / "whole", world / "missed")
    ledger = RunDir(world / "missed").ledger(0)
    start, first, *rest = ledger.read_text().splitlines()
    first = json.dumps({**json.loads(first), "samples": json.loads(first)["samples"][1:]})
    ledger.write_text("\n".join([start, first, *rest, ""]))
    found = lpl("audit", world / "missed", check=False)
    assert found.returncode == 2 and "update 1: 1 samples missed" in found.stderr
    assert "seen 2 to 2 times" in lpl("audit", world / "whole").stdout, "64 of 32"


def test_a_damaged_shard_is_named_before_training(world):
    """Every start reads the shards once, shared out over the ranks; one byte is enough."""
    shutil.copytree(world / "latents", world / "damaged")
    shard = next((world / "damaged").glob("latents-*.tar"))
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    done = lpl(
        "train",
        world / "train.yaml",
        f"run_dir={world}/never",
        f"data.folder={world}/damaged",
        check=False,
    )
    assert done.returncode == 2 and shard.name in done.stderr and not (world / "never").exists()


def test_export(world):
    """Whole weights of a run of two ranks, of any kind, and an average of a length that nobody
    tracked.
    """
    run, out = world / "whole", world / "exported"
    out.mkdir()
    for name in ("raw", "ema_power_0.050"):
        lpl("export", run, "--weights", name, "--output", out / f"{name}.safetensors")
    raw = load_file(out / "raw.safetensors")
    assert {f"pieces_00000.safetensors/param/{name}" for name in raw} == weights(run, 8).keys()
    assert all(
        tensor.flatten().equal(weights(run, 8)[f"pieces_00000.safetensors/param/{name}"])
        for name, tensor in raw.items()
    )
    assert [path.name for path in sorted((run / "snapshots").iterdir())] == [
        f"step_{step:08d}" for step in (2, 4, 6, 8)
    ]
    lpl("export", run, "--sigma-rel", "0.05", "--output", out / "made.safetensors")
    made, tracked = (
        load_file(out / "made.safetensors"),
        load_file(out / "ema_power_0.050.safetensors"),
    )
    assert all(torch.allclose(made[name], tracked[name], rtol=1e-4, atol=1e-6) for name in tracked)
    assert not all(torch.allclose(made[name], raw[name], rtol=1e-4, atol=1e-6) for name in raw)
    refused = lpl(
        "export", run, "--sigma-rel", "0.07", "--step", "5", "--output", out / "no", check=False
    )
    assert (
        refused.returncode == 2 and "no snapshot of step 5, there are: 2, 4, 6, 8" in refused.stderr
    )


def test_sample_evaluate_report(world):
    run = world / "whole"
    lpl("evaluate", run, world / "quick.yaml")
    scores = json.loads((run / "evaluations" / "step_00000008" / "quick.json").read_text())
    assert [r["guidance_scale"] for r in scores["results"]] == [1.0, 2.0]
    assert all(
        "efficientnet_lite0" in json.dumps(r) and '"fid"' not in json.dumps(r)
        for r in scores["results"]
    )
    assert (run / "evaluations" / "step_00000004" / "quick.json").is_file()
    lpl("sample", run, "--images", "4", "--sampler-steps", "2", "--output", world / "grid.png")
    assert (world / "grid.png").stat().st_size > 100
    lpl("report", run)
    page = (run / "report.html").read_text()
    assert "<svg" in page or "data:image" in page
    assert 'src="http' not in page and 'href="http' not in page


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, time; t = time.perf_counter(); from lpl_pretrain.cli.main import commands\n"
        "try: commands(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_doctor_answers():
    done = lpl("doctor", check=False, cold=True)
    assert "torch" in done.stdout and "slurm" in done.stdout and done.returncode in (0, 1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["batch.global_batchsize=8"],
            ["batch.global_batchsize", "did you mean 'global_batch_size'"],
        ),
        (
            ["batch.micro_batch_size=3"],
            ["batch.global_batch_size=8 is not a multiple of micro_batch_size=3"],
        ),
        (["model.patch_size=3"], ["model.patch_size=3", "divisor of 8"]),
        (["autoencoder=asset:autoencoder_emoji"], ["was encoded by autoencoder", "encode again"]),
        (["data.folder=absent"], ["absent/index.json", "encode"]),
        (
            ["optimizer.lr=0.5"],
            [
                "belongs to another configuration",
                "optimizer.lr: the run has 0.001, you ask for 0.5",
            ],
        ),
        (["parallel.strategy=zero", "parallel.zero_config=absent.json"], ["absent.json"]),
        (["lpl.start_step=9"], ["lpl.start_step=9 with steps=9", "LPL never runs"]),
    ],
)
def test_bad_input_is_refused_before_training(world, arguments, words):
    done = lpl(
        "train", world / "train.yaml", f"run_dir={world}/whole", "steps=9", *arguments, check=False
    )  # of 8: to go on
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_post_training_from_a_run_that_is_gone_later(world, tmp_path):
    """It begins with that run's average; when it goes on, nothing is asked of where it began."""
    shutil.copytree(world / "whole", tmp_path / "before")
    first = [
        world / "train.yaml",
        f"run_dir={tmp_path / 'after'}",
        f"init_from={{run: {tmp_path / 'before'}}}",
    ]
    lpl("train", *first, "steps=5")
    shutil.rmtree(tmp_path / "before")
    lpl("train", *first, "steps=6")
    assert list(logged_losses(tmp_path / "after")) == [1, 2, 3, 4, 5, 6]
    refused = lpl("train", *first, f"run_dir={tmp_path / 'new'}", check=False)
    assert (
        refused.returncode == 2
        and "init_from.run=" in refused.stderr
        and "no complete checkpoint" in refused.stderr
    )
