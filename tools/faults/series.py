"""Series: jobs to disturb, when they are complete, and what must equal an undisturbed run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpl_pretrain.cli import audit
from lpl_pretrain.config.dataset import INDEX_NAME
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import LPLError
from tests.support.autoencoders import tiny_folder
from tests.support.latents import draw_images

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 18
STEPS = 6
ENCODE = """
source: {inputs}/images
output: {inputs}/latents
autoencoder: {inputs}/autoencoder
resolution_px: 32
shard_samples: 3
batch_size: 2
flips: true
"""
TRAIN = """
name: chaos
steps: {steps}
autoencoder: {inputs}/autoencoder
data: {{folder: {inputs}/latents}}
model: {{width: 32, depth: 2, heads: 2}}
diffusion: {{prediction: flow, schedule: rectified_flow}}
lpl: {{target_fraction: 0.2, gate: {{noise_level_below: 1.0}}, start_step: 0, calibration_steps: 3}}
optimizer: {{lr: 1.0e-3}}
batch: {{global_batch_size: 4}}
checkpoint: {{every_steps: 2, asynchronous: true}}
ema: {{sigma_rel: [0.05, 0.1], snapshot_every_steps: 3}}
log: {{every_steps: 1, sample_indices: true}}
"""
PROTOCOL = """
name: quick
images: 4
batch_size: 2
sampler: {{kind: euler, steps: 2}}
guidance_scales: [1.0]
reference: {inputs}/few
grid_images: 4
metrics: [kid]
kid_subsets: 2
kid_subset_size: 4
best: kid_efficientnet_lite0
"""
CHANGING = {"finished_at", "seconds", "images_made_now", "processes"}
"""Keys of a record that differ between two undisturbed evaluations."""
TEMPORARY = (".tmp", ".lease", ".partial", ".lock", ".stale", ".writing")


@dataclass
class Series:
    """A command that is started repeatedly and writes a folder; `python -m module` runs it."""

    name: str
    inputs: Path
    module: str = "lpl_pretrain"
    ranks: tuple[int, ...] = (1,)
    """Numbers of ranks, used by iterations in turn."""
    communicate: bool = False
    """Whether ranks communicate."""
    arguments: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Write additional inputs, once."""

    def begin(self, folder: Path) -> None:
        """Write the folder that the command starts from."""
        folder.mkdir(parents=True)

    def command(self, folder: Path) -> list[str]:
        raise NotImplementedError

    def complete(self, folder: Path) -> bool:
        raise NotImplementedError

    def results(self, folder: Path) -> dict[str, bytes]:
        """Contents that must equal those of an undisturbed run, by name."""
        raise NotImplementedError

    def problems(self, folder: Path) -> list[str]:
        """Other problems of a complete job."""
        return []

    def lease(self, folder: Path) -> Path | None:
        """Lease that the command holds while it runs, if any."""
        return None

    def temporaries(self, folder: Path) -> list[str]:
        """Temporary files and folders, which a complete job must not leave."""
        names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        return sorted(
            name for name in names if Path(name).name.startswith(".") or name.endswith(TEMPORARY)
        )


class Encode(Series):
    def command(self, folder: Path) -> list[str]:
        return [
            self.module,
            "encode",
            f"{self.inputs}/encode.yaml",
            f"output={folder}/latents",
            *self.arguments,
        ]

    def complete(self, folder: Path) -> bool:
        return (folder / "latents" / INDEX_NAME).is_file()

    def results(self, folder: Path) -> dict[str, bytes]:
        return contents(folder / "latents")


@dataclass
class Train(Series):
    config: str = "train.yaml"
    steps: int = STEPS

    def command(self, folder: Path) -> list[str]:
        return [
            self.module,
            "train",
            f"{self.inputs}/{self.config}",
            f"run_dir={folder}/run",
            *self.arguments,
        ]

    def complete(self, folder: Path) -> bool:
        return self.steps in RunDir(folder / "run").complete_checkpoints()

    def results(self, folder: Path) -> dict[str, bytes]:
        """Files of the last checkpoint and of all snapshots."""
        run_dir = RunDir(folder / "run")
        files = {
            f"checkpoint/{name}": data
            for name, data in contents(run_dir.checkpoint(self.steps)).items()
        }
        return files | {
            f"snapshots/{name}": data for name, data in contents(run_dir.path / "snapshots").items()
        }

    def problems(self, folder: Path) -> list[str]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                audit.run(str(folder / "run"))
        except LPLError as error:
            return [f"audit: {error}"]
        steps = [
            line["step"]
            for line in json_lines(folder / "run" / "metrics.jsonl")
            if "event" not in line
        ]
        missing = sorted(set(range(1, self.steps + 1)) - set(steps))
        return [f"metrics.jsonl: no line of steps {missing}"] if missing else []

    def lease(self, folder: Path) -> Path | None:
        return RunDir(folder / "run").live


class Spikes(Train):
    """Training with rollbacks after spikes of the loss on a poisoned shard."""

    def prepare(self) -> None:
        from tests.support.spikes import poisoned_data, spike_config

        data = poisoned_data(self.inputs / "spikes")
        (self.inputs / self.config).write_text(dump(spike_config(data, "rollback")))


class Evaluate(Series):
    def begin(self, folder: Path) -> None:
        shutil.copytree(self.inputs / "run", folder / "run")

    def command(self, folder: Path) -> list[str]:
        return [
            self.module,
            "evaluate",
            f"{folder}/run",
            f"{self.inputs}/quick.yaml",
            *self.arguments,
        ]

    def complete(self, folder: Path) -> bool:
        run_dir = RunDir(folder / "run")
        return not run_dir.pending_evaluations("quick") and run_dir.best("quick").is_file()

    def results(self, folder: Path) -> dict[str, bytes]:
        """Scores without the keys in CHANGING, sample grids, and statistics of the reference."""
        run = folder / "run"
        records = {
            path: json.loads(path.read_text())
            for path in sorted((run / "evaluations").rglob("*.json"))
        }
        records_text = {
            path: json.dumps(without(record, CHANGING)).replace(str(folder), "")
            for path, record in records.items()
        }
        scores = {str(path.relative_to(run)): text.encode() for path, text in records_text.items()}
        others = [*(run / "evaluations").rglob("*.safetensors"), *run.rglob("*.png")]
        return scores | {str(path.relative_to(run)): path.read_bytes() for path in others}


def prepare(inputs: Path) -> None:
    """Write images, a tiny autoencoder and configurations.

    Latents and a trained run come from undisturbed starts of other series.
    """
    inputs.mkdir(parents=True)
    draw_images(inputs / "images", NUM_IMAGES)
    draw_images(inputs / "few", 6)
    tiny_folder(inputs / "autoencoder", levels=2, attention=False)
    for name, text in (("encode", ENCODE), ("train", TRAIN), ("quick", PROTOCOL)):
        (inputs / f"{name}.yaml").write_text(text.format(inputs=inputs, steps=STEPS))


def zero(stage: int) -> list[str]:
    file = {2: "configs/zero/zero2.json", 3: "tests/support/zero3_partitioned.json"}[stage]
    return ["parallel.strategy=zero", f"parallel.zero_config={ROOT}/{file}"]


def all_series(inputs: Path, module: str = "lpl_pretrain") -> dict[str, Series]:
    two = {"ranks": (2,), "communicate": True}
    series_list = [
        Encode("encode", inputs, module, ranks=(1, 2)),
        Train("train_local", inputs, module),
        Spikes("train_spikes", inputs, module, config="spikes.yaml", steps=16),
        Train("train_fsdp2", inputs, module, **two, arguments=["parallel.strategy=fsdp2"]),
        Train("train_zero2", inputs, module, **two, arguments=zero(2)),
        Train("train_zero3", inputs, module, **two, arguments=zero(3)),
        Evaluate("evaluate", inputs, module, ranks=(1, 2), communicate=True),
    ]
    return {series.name: series for series in series_list}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, list) else value


def json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
