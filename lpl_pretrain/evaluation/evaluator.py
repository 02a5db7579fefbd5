"""Scores checkpoints by a protocol: generate images, extract features, compute metrics, record.

The evaluator meets the trainer in files only: it reads complete checkpoints and writes
evaluations/step_*/<protocol>.json, whole and last.  Any number of evaluators may work on a run: a
lease on each (step, protocol) leaves it to one of them, and keeps the checkpoint from being removed
meanwhile (checkpoint/retention.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config.evaluation import check_protocol, check_sampler
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.metrics import METRICS
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.records import FORMAT_VERSION
from lpl_pretrain.config.renamed_keys import with_first_keys
from lpl_pretrain.config.rundir import MANIFEST, RunDir
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.evaluation.agree import run_and_agree
from lpl_pretrain.evaluation.best_checkpoint import repair_best, update_best
from lpl_pretrain.evaluation.build_reference import open_reference
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.generate import RULES
from lpl_pretrain.evaluation.image_files import write_grid
from lpl_pretrain.evaluation.metric import MetricInputs
from lpl_pretrain.evaluation.preconditions import (
    WORK_KEY_LENGTH,
    check_enough_images,
    check_same_protocol,
    clean_scored_steps,
)
from lpl_pretrain.evaluation.reference import Reference
from lpl_pretrain.evaluation.registry import average_over_seeds, compute_scores, load_extractor
from lpl_pretrain.evaluation.save_images import save_images
from lpl_pretrain.evaluation.trained_run import TrainedRun, open_run
from lpl_pretrain.runtime.atomic import atomic_write_json
from lpl_pretrain.runtime.dist import any_over_ranks, broadcast_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.world import World

PACKAGES = ("lpl-pretrain", "torch", "diffusers", "timm", "torchvision", "transformers", "Pillow")
"""Packages whose versions a record names."""
PIXELS = "pixels"
"""Name of the tensor of generated images in a feature store."""


def evaluate(
    run_dir: RunDir,
    protocol: EvaluateConfig,
    device: torch.device,
    steps: list[int] | None = None,
    world: World | None = None,
    *,
    again: bool = True,
    passed_over: dict[int, str] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Collective.  Scores every complete checkpoint without a score by this protocol, or `steps`.

    Yields each record once it is written.  A step that another evaluator works on is left to it.

    Args:
        again: score `steps` once more that have a score.
        passed_over: filled with the problems of checkpoints that are not scored, by step.
        stopping: asked before each batch; when true on a rank, evaluation ends early on all.

    Raises ConfigError, CheckpointError or DataError before anything is generated.  A checkpoint
    that is damaged or gone raises CheckpointError when it is one of `steps`; otherwise it is named
    in the log and in `passed_over`, and the others are scored.
    """
    passed_over = {} if passed_over is None else passed_over
    world = world or World()
    check_protocol(protocol)
    check_sampler(load_run_config(run_dir).diffusion.prediction, protocol.sampler)
    run_dir.complete_step(None)
    unscored = run_dir.pending_evaluations(protocol.name)
    pending = [step for step in unscored if step not in passed_over]
    wanted = pending
    if steps is not None:
        wanted = [run_dir.complete_step(step) for step in steps if again or step in pending]
    wanted = broadcast_json(wanted)
    check_same_protocol(run_dir, protocol)
    if world.rank == 0:
        repair_best(run_dir, protocol)
        clean_scored_steps(run_dir, protocol.name)
    if not wanted:
        return
    run = open_run(run_dir, device, protocol.guide)
    extractors = [load_extractor(entry, device) for entry in protocol.extractors]
    check_enough_images(protocol, extractors)
    reference = open_reference(run_dir, protocol, run.index.resolution_px, extractors, world)
    evaluator = Evaluator(run, protocol, extractors, reference, world, stopping)
    with suppress(Stopped):
        for step in wanted:
            try:
                record = evaluator.score(step, again=again and steps is not None)
            except CheckpointError as error:
                if steps is not None:
                    raise
                passed_over[step] = str(error)
                log.warning("step %d is not scored: %s", step, error)
                continue
            if record is not None:
                yield record


class Stopped(Exception):
    """Raised on all ranks when `stopping` ended an evaluation; extracted features are kept."""


class Evaluator:
    """Everything that the scores of one run by one protocol have in common."""

    def __init__(
        self,
        run: TrainedRun,
        protocol: EvaluateConfig,
        extractors: list[Extractor],
        reference: Reference,
        world: World,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run = run
        self.protocol = protocol
        self.extractors = extractors
        self.reference = reference
        self.world = world
        self.stopping = stopping

    def score(self, step: int, *, again: bool) -> dict[str, Any] | None:
        """Collective.  Scores one step and writes its record; returns the record.

        Returns None where another evaluator has the step's lease, and where the step is scored
        already, unless `again`.  Raises CheckpointError on all ranks for a checkpoint that is
        damaged, or was removed in the meantime.
        """
        run_dir = self.run.run_dir
        name = self.protocol.name
        rank0 = self.world.rank == 0
        lease = Lease(run_dir.evaluation_lease(step, name))
        run_and_agree(lease.take, act=rank0)
        with lease if rank0 else nullcontext():
            done = (
                not again
                and step not in run_dir.pending_evaluations(name)
                and self._is_complete(step)
            )
            if not broadcast_json(lease.held and not done):
                return None
            manifest = run_and_agree(partial(self._manifest, step)) or b""
            work = self._work_folder(step, manifest)
            results, samples = self._results(step, work)
            if not rank0:
                return broadcast_json(None)
            record = self._record(step, manifest, results, samples)
            atomic_write_json(run_dir.evaluation(step, name), record)
            shutil.rmtree(work, ignore_errors=True)
            for warning in update_best(run_dir, self.protocol):
                log.warning("%s", warning)
            return broadcast_json(record)

    def _record(
        self, step: int, manifest: bytes, results: list[dict[str, Any]], samples: str | None
    ) -> dict[str, Any]:
        """Content of evaluations/step_*/<protocol>.json: scores and all that they depend on."""
        index = self.run.index
        return {
            "format_version": FORMAT_VERSION,
            "step": step,
            "samples_seen": step * self.run.config.batch.global_batch_size,
            "results": results,
            "samples": samples,
            "protocol": self.protocol.model_dump(mode="json"),
            "rules": RULES,
            "checkpoint_manifest_sha256": hashlib.sha256(manifest).hexdigest(),
            "data_fingerprint": index.fingerprint,
            "autoencoder_identity": index.autoencoder.identity,
            "extractors": {
                extractor.config.label: extractor.identity() for extractor in self.extractors
            },
            "reference": self.reference.provenance,
            "versions": {name: _version(name) for name in PACKAGES},
            "device": self.run.generator.device.type,
            "processes": self.world.world_size,
            "threads": torch.get_num_threads(),
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _is_complete(self, step: int) -> bool:
        return step in self.run.run_dir.complete_checkpoints()

    def _manifest(self, step: int) -> bytes:
        """Content of the checkpoint's manifest.  Raises CheckpointError."""
        folder = self.run.run_dir.checkpoint(step)
        if not self._is_complete(step):
            raise CheckpointError(f"{folder}: was removed before its evaluation began")
        try:
            return (folder / MANIFEST).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder / MANIFEST}: {error.strerror or error}") from None

    def _load(self, step: int, weights: str) -> None:
        """Load weights into the denoiser.  Raises CheckpointError."""
        try:
            self.run.load(step, weights)
        except CheckpointError:
            if self._is_complete(step):
                raise
            raise CheckpointError(
                f"{self.run.run_dir.checkpoint(step)}: was removed during its evaluation"
            ) from None

    def _work_folder(self, step: int, manifest: bytes) -> Path:
        """Folder of features until the record is written.

        Its name is keyed by everything that the features depend on, so that those of another
        protocol or checkpoint are never used.
        """
        depends_on = [
            with_first_keys("EvaluateConfig", self.protocol.model_dump(mode="json")),
            [extractor.identity() for extractor in self.extractors],
            self.run.index.fingerprint,
        ]
        key = hashlib.sha256(json.dumps(depends_on).encode() + manifest).hexdigest()
        record = self.run.run_dir.evaluation(step, self.protocol.name)
        return record.with_suffix(f".{key[:WORK_KEY_LENGTH]}.partial")

    def _results(self, step: int, work: Path) -> tuple[list[dict[str, Any]], str | None]:
        """Collective.  Returns the record's `results` (on rank 0) and its image grid's path."""
        protocol = self.protocol
        results: list[dict[str, Any]] = []
        samples = None
        for weights in protocol.weights:
            run_and_agree(partial(self._load, step, weights))
            for scale in protocol.guidance_scales:
                started = time.monotonic()
                stores, generated = self._generate_all(step, weights, scale, work)
                if any_over_ranks(self.stopping())[0]:  # waits for all ranks
                    raise Stopped
                if self.world.rank != 0:
                    continue
                entries = average_over_seeds([self._scores(store) for store in stores])
                shared = {"weights": weights, "guidance_scale": scale, "images": protocol.images}
                seconds = round(time.monotonic() - started, 2)
                cost = {"seconds": seconds, "images_made_now": generated}
                results += [{**shared, **entry, **cost} for entry in entries]
                if protocol.keep_images != "none":
                    save_images(self.run, step, protocol, weights, scale, stores[0].rows(PIXELS))
                largest = scale == max(protocol.guidance_scales)
                if protocol.grid_images and samples is None and largest:
                    path = self.run.run_dir.samples(step, protocol.name)
                    write_grid(path, stores[0].read_first(PIXELS, protocol.grid_images))
                    samples = str(path.relative_to(self.run.run_dir.path))
        return results, samples

    def _generate_all(
        self, step: int, weights: str, scale: float, work: Path
    ) -> tuple[list[FeatureStore], int]:
        """Fill one store for each seed with this rank's batches.

        Returns the stores and the number of images that were generated just now.
        """
        protocol = self.protocol
        stores = []
        generated = 0
        for seed in range(protocol.seed, protocol.seed + protocol.repeats):
            folder = work / f"{weights}_w{scale:g}_seed{seed}"
            store = FeatureStore(folder, protocol.images, protocol.batch_size)
            description = f"step {step}, {weights}, guidance {scale:g}"
            generated += self._generate(store, seed, scale, description)
            stores.append(store)
        return stores, generated

    def _scores(self, store: FeatureStore) -> list[dict[str, Any]]:
        return [
            entry
            for extractor in self.extractors
            for entry in compute_scores(
                MetricInputs(self.protocol, extractor, store, self.reference)
            )
        ]

    def _generate(self, store: FeatureStore, seed: int, scale: float, description: str) -> int:
        """Generate this rank's missing batches and extract their features; returns their images."""
        missing = store.missing(self.world.rank, self.world.world_size)
        generated = 0
        with progress(sum(map(len, missing)), "img", description) as bar:
            for batch in missing:
                if self.stopping():
                    break
                pixels = self.run.generator.pixels(
                    batch,
                    seed=seed,
                    sampler=self.protocol.sampler,
                    guidance_scale=scale,
                    precision=self.protocol.precision,
                )
                store.put(batch, self._tensors(batch, seed, pixels))
                generated += len(batch)
                bar.update(len(batch))
        return generated

    def _tensors(self, batch: range, seed: int, pixels: Tensor) -> dict[str, Tensor]:
        """Features of a batch by `<extractor>/<kind>`, and the pixels that are to be saved."""
        protocol = self.protocol
        captions_needed = any(METRICS[name].compares_captions for name in protocol.metrics)
        tensors: dict[str, Tensor] = {}
        for extractor in self.extractors:
            label = extractor.config.label
            tensors |= {f"{label}/{kind}": rows for kind, rows in extractor(pixels).items()}
            if captions_needed and extractor.embed_text is not None:
                tensors[f"{label}/text"] = extractor.embed_text(self.run.captions(seed, batch))
        saved = max(protocol.grid_images - batch.start, 0)
        if protocol.keep_images != "none":
            saved = len(pixels)
        if saved and seed == protocol.seed:
            tensors[PIXELS] = pixels[:saved]
        return tensors


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
