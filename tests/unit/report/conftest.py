"""A run's files as a trainer and an evaluator leave them: 120 logged steps, LPL from step 40, one
stop and resume, two scores.
"""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from tests.support.configs import train_config

PROTOCOL = {"name": "quick", "sampler": {"kind": "euler", "steps": 5}}


def metrics(step: int, mark: float = 0.0) -> dict:
    values = {
        "step": step,
        "time_s": 1.7e9 + step,
        "loss/total": 1 / step + mark,
        "loss/diffusion": 0.9 / step,
        "grad_norm": 0.5,
        "samples_per_s": 100.0,
        "samples_seen": 8 * step,
        "lr": 1e-3,
        "seconds/all": 0.4,
        "seconds/forward": 0.1,
        "seconds/backward": 0.2,
        "tflops_per_s": 0.3,
    }
    if step >= 40:
        values |= {
            "loss/lpl": 2.0,
            "lpl/weight": 0.1,
            "lpl/weighted_share": 0.2,
            "lpl/gated_share": 0.4,
        }
        values |= {"seconds/lpl": 0.1}
        values |= {
            f"lpl/stage/{stage}/{quantity}": 0.5
            for stage in ("mid", "up0")
            for quantity in ("contribution", "keep_fraction", "std_ratio")
        }
    return values


@pytest.fixture
def run(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path / "a run")
    run_dir.path.mkdir()
    run_dir.config.write_text(
        dump(train_config(name="<b>tiny<i> & co", steps=120, lpl={"target_fraction": 0.2}))
    )
    run_dir.provenance.write_text(
        json.dumps(
            {
                "git_commit": "abc",
                "git_diff": "-old\n+<script>alert(1)</script>",
                "versions": {"torch": "2.14.1", "deepspeed": None},
                "argv": ["lpl-pretrain", "train", "x.yaml"],
                "world_size": 2,
                "data_samples": 64,
                "something_new": {"a": [1]},
            }
        )
    )
    lines = [metrics(step, mark=7.0 if step > 75 else 0.0) for step in range(1, 81)]
    lines += [
        {"event": "stopped", "step": 75, "time_s": 1.7e9, "signal": "SIGTERM"},
        {"event": "resumed", "step": 75, "time_s": 1.7e9},
    ]
    lines += [metrics(step) for step in range(76, 121)]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (60, 120):
        samples = run_dir.samples(step, "quick")
        samples.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(samples)
        shared = [{"weights": "ema", "guidance_scale": w, "images": 10} for w in (1.0, 2.5)]
        results = [
            entry
            for each in shared
            for entry in (
                {
                    **each,
                    "metric": "fd_x",
                    "value": 90.0 / each["guidance_scale"] - step / 10,
                    "at_half": 95.0,
                },
                {
                    **each,
                    "metric": "kid_x",
                    "value": 0.5 - step / 1000,
                    "std": 0.03,
                    "low": 0.4 - step / 1000,
                    "high": 0.6,
                },
            )
        ]
        record = {
            "step": step,
            "results": results,
            "protocol": PROTOCOL,
            "extractors": {"x": {"dimension": 1280}},
            "samples": str(samples.relative_to(run_dir.path)),
            "reference": {"pictures": 5, "grid": "reference_x.png"},
        }
        path = run_dir.evaluation(step, "quick")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
        run_dir.panels("lpl", step).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "green").save(run_dir.panels("lpl", step))
    Image.new("RGB", (8, 8), "blue").save(run_dir.path / "evaluations" / "reference_x.png")
    return run_dir
