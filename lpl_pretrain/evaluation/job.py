"""One evaluation: which checkpoints a protocol has still to score, and what a score is made of.

It meets the trainer in files only: complete checkpoints in, evaluations/step_*/<protocol>.json out, written last and whole.
"""

from __future__ import annotations

import hashlib
import json
import time
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config.evaluation import check_protocol, check_sampler
from lpl_pretrain.config.load import differences, load_run_config, validate
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import MANIFEST, RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.features import Extractor, load_extractor
from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.files import publish_grid, publish_json
from lpl_pretrain.evaluation.generate import RULES
from lpl_pretrain.evaluation.load import TrainedRun, open_run, pick_device
from lpl_pretrain.evaluation.reference import Reference, reference_statistics
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.runtime.log import progress

FORMAT_VERSION = 1
PACKAGES = ("lpl-pretrain", "torch", "diffusers", "timm", "torchvision", "Pillow")


def evaluate(run_dir: RunDir, protocol: EvaluateConfig, steps: list[int] | None = None) -> list[dict[str, Any]]:
    """Scores `steps`, again if they have scores; without them every complete checkpoint that this protocol has not scored.

    Returns what was written, one record a step.  Raises ConfigError, CheckpointError or DataError before anything is generated.
    """
    check_protocol(protocol)
    check_sampler(load_run_config(run_dir).diffusion.prediction, protocol.sampler)
    run_dir.complete_step(None)
    wanted = run_dir.pending_evaluations(protocol.name) if steps is None else [run_dir.complete_step(step) for step in steps]
    check_same_protocol(run_dir, protocol)
    if not wanted:
        return []
    device = pick_device()
    run, extractor = open_run(run_dir, device, protocol.guide), load_extractor(protocol, device)
    reference = reference_statistics(
        run_dir,
        protocol.reference,
        run.index.resolution_px,
        extractor,
        batch_size=protocol.batch_size,
        grid_images=protocol.grid_images,
    )
    return [score(run, protocol, extractor, reference, step) for step in wanted]


def score(run: TrainedRun, protocol: EvaluateConfig, extractor: Extractor, reference: Reference, step: int) -> dict[str, Any]:
    """Generates, compares and writes the record of one step."""
    run.load(step, protocol.weights)
    manifest = (run.run_dir.checkpoint(step) / MANIFEST).read_bytes()
    results: list[dict[str, Any]] = []
    shown: dict[float, Tensor] = {}
    for scale in protocol.guidance_scales:
        started = time.monotonic()
        statistics, shown[scale] = generated_statistics(run, protocol, extractor, scale, f"step {step}, guidance {scale:g}")
        distance = frechet_distance(statistics, reference.statistics)
        results.append(
            {
                "guidance_scale": scale,
                "metric": extractor.metric,
                "value": distance,
                "images": statistics.count,
                "seconds": round(time.monotonic() - started, 2),
            }
        )
    samples = run.run_dir.samples(step, protocol.name)
    if protocol.grid_images:
        publish_grid(samples, shown[max(protocol.guidance_scales)])
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "samples_seen": step * run.config.batch.global_batch_size,
        "results": results,
        "samples": str(samples.relative_to(run.run_dir.path)) if protocol.grid_images else None,
        "protocol": protocol.model_dump(mode="json"),
        "rules": RULES,
        "weights": protocol.weights,
        "checkpoint_manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "data_fingerprint": run.index.fingerprint,
        "autoencoder_identity": run.index.autoencoder.identity,
        "extractor": extractor.identity(),
        "reference": reference.facts,
        "versions": {name: _version(name) for name in PACKAGES},
        "device": run.generator.device.type,
        "threads": torch.get_num_threads(),
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    publish_json(run.run_dir.evaluation(step, protocol.name), record)
    return record


def generated_statistics(
    run: TrainedRun, protocol: EvaluateConfig, extractor: Extractor, guidance_scale: float, desc: str
) -> tuple[FeatureStatistics, Tensor]:
    """Statistics of all pictures, and the first `grid_images` of them (N, 3, H_px, W_px) uint8."""
    statistics, shown = FeatureStatistics(extractor.dimension), []
    with progress(protocol.images, "img", desc) as bar:
        for pixels in run.generator.pixels(
            protocol.images,
            protocol.batch_size,
            seed=protocol.seed,
            sampler=protocol.sampler,
            guidance_scale=guidance_scale,
            precision=protocol.precision,
        ):
            shown.append(pixels[: max(protocol.grid_images - statistics.count, 0)].cpu())
            statistics.update(extractor(pixels))
            bar.update(len(pixels))
    return statistics, torch.cat(shown)


def check_same_protocol(run_dir: RunDir, protocol: EvaluateConfig) -> None:
    """Raises ConfigError when scores of this name were made by other settings: one curve must not mix two protocols."""
    for path in sorted(run_dir.path.glob(f"evaluations/step_*/{protocol.name}.json")):
        stored = validate(EvaluateConfig, json.loads(path.read_text())["protocol"], where=str(path))
        if changed := differences(stored, protocol):
            lines = [f"  {key}: scored with {old!r}, you ask for {new!r}" for key, (old, new) in changed.items()]
            raise ConfigError(
                f"{path} was scored by another protocol of the same name:\n"
                + "\n".join(lines)
                + f"\ngive this one another name, such as name={protocol.name}_2, or set these back"
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
