"""The commands end to end on 32 images: encode, train, resume, sample, evaluate, report; errors."""

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


def test_a_run_writes_the_files_that_the_readme_lists(world):
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


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(world):
    run = world / "parts"
    lpl("train", world / "train.yaml", f"run_dir={run}", "steps=5", "checkpoint.every_steps=3")
    # resume from step 3, while LPL's weight is being calibrated
    shutil.rmtree(run / "checkpoints" / "step_00000005")
    lpl("train", world / "train.yaml", f"run_dir={run}")
    assert logged_losses(run) == logged_losses(world / "whole")
    for kind in ("param", "ema", "optimizer"):
        got = weights(run, 8, kind)
        wanted = weights(world / "whole", 8, kind)
        assert got.keys() == wanted.keys() and all(got[name].equal(wanted[name]) for name in got)


def test_a_run_with_a_held_lease_is_refused(world):
    run = world / "held"
    with Lease(RunDir(run).live) as lease:
        assert lease.held
        refused = lpl("train", world / "train.yaml", f"run_dir={run}", check=False)
    assert (
        refused.returncode == 2 and f"is being trained by process {os.getpid()}" in refused.stderr
    )
    assert not (run / "metrics.jsonl").exists()


def test_training_ends_when_its_lease_is_taken_over(world):
    """This happens when a job was suspended and restarted elsewhere."""
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
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as trainer:
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        other = run / "mine.lease"
        other.write_text(json.dumps({"token": "another"}))
        os.rename(other, RunDir(run).live)
        stderr = trainer.communicate(timeout=60)[1]
    assert trainer.returncode == 1 and "is being trained by another process now" in stderr


def test_inline_evaluation(world):
    """Two ranks score every checkpoint without changing the run.

    A protocol that does not fit the model is refused before training.
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


def test_has_teeth_another_seed_gives_another_run(world):
    """The same run also writes offline wandb files and warns once of a ramp that never ends."""
    changes = ["steps=5", "seed=1", "lpl.ramp_steps=4", "log.wandb.mode=offline"]
    stderr = lpl("train", world / "train.yaml", f"run_dir={world}/seed", *changes).stderr
    assert (
        stderr.count(
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
def test_two_ranks_resume_after_sigterm(world, arguments):
    """torchrun forwards SIGTERM; both ranks save at the same step and the same command resumes.

    Losses equal those of one process.
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
def test_a_signal_before_the_first_step_takes_effect_after_it(world, moment):
    """Training makes one update, saves it and ends."""
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
    stderr = trainer.communicate(timeout=120)[1]
    assert trainer.returncode == 0 and "SIGUSR2: stopped after step 1 of 8" in stderr, stderr
    assert RunDir(run).complete_checkpoints() == [1]


def test_audit_reports_a_missing_sample(world):
    shutil.copytree(world / "whole", world / "missed")
    ledger = RunDir(world / "missed").ledger(0)
    start, first, *rest = ledger.read_text().splitlines()
    first = json.dumps({**json.loads(first), "samples": json.loads(first)["samples"][1:]})
    ledger.write_text("\n".join([start, first, *rest, ""]))
    refused = lpl("audit", world / "missed", check=False)
    assert refused.returncode == 2 and "update 1: 1 samples missed" in refused.stderr
    assert "read 2 to 2 times" in lpl("audit", world / "whole").stdout, "64 of 32"


def test_a_corrupt_shard_is_reported_before_training(world):
    """Every start hashes the shards, split over the ranks; one changed byte is detected."""
    shutil.copytree(world / "latents", world / "corrupt")
    shard = next((world / "corrupt").glob("latents-*.tar"))
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    done = lpl(
        "train",
        world / "train.yaml",
        f"run_dir={world}/never",
        f"data.folder={world}/corrupt",
        check=False,
    )
    assert done.returncode == 2 and shard.name in done.stderr and not (world / "never").exists()


def test_export(world):
    """Export raw weights, a tracked average, and an average reconstructed from snapshots."""
    run = world / "whole"
    out = world / "exported"
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


def test_help_imports_no_torch():
    code = (
        "import sys; from lpl_pretrain.cli.main import commands\n"
        "try: commands(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_doctor():
    done = lpl("doctor", check=False, cold=True)
    assert "torch" in done.stdout and "slurm" in done.stdout and done.returncode in (0, 1)


@pytest.mark.parametrize(
    "arguments, phrases",
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
def test_bad_input_is_refused_before_training(world, arguments, phrases):
    # the run has 8 steps and would be continued
    done = lpl(
        "train", world / "train.yaml", f"run_dir={world}/whole", "steps=9", *arguments, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for phrase in phrases:
        assert phrase in done.stderr


def test_init_from_a_run_that_is_deleted_later(world, tmp_path):
    """The first start loads the other run's average; a resumed one does not read that run."""
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
