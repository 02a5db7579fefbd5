"""One evaluation: which checkpoints a protocol has still to score, and what a score is made of.

It meets the trainer in files only: complete checkpoints in, evaluations/step_*/<protocol>.json out,
written last and whole.  Any number of evaluators may work on a run: a lease on every (step,
protocol) keeps them apart, and the checkpoint from being removed.
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
from lpl_pretrain.config.load import differences, load_run_config, validate_stored
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.records import FORMAT_VERSION, read_record
from lpl_pretrain.config.renamed_keys import with_first_keys
from lpl_pretrain.config.rundir import MANIFEST, RunDir
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.evaluation.agree import run_and_agree
from lpl_pretrain.evaluation.best_checkpoint import repair_best, update_best
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.features import load_extractor
from lpl_pretrain.evaluation.generate import RULES
from lpl_pretrain.evaluation.image_files import publish_grid, publish_json
from lpl_pretrain.evaluation.reference import Reference, open_reference
from lpl_pretrain.evaluation.registry import over_seeds, scores
from lpl_pretrain.evaluation.save_images import save_images
from lpl_pretrain.evaluation.trained_run import TrainedRun, open_run
from lpl_pretrain.runtime.dist import any_over_ranks, broadcast_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.world import World

PACKAGES = ("lpl-pretrain", "torch", "diffusers", "timm", "torchvision", "transformers", "Pillow")
PIXELS = "pixels"
KEY_LENGTH = 12
"""Hexadecimal digits in the name of a folder of features."""
FREE_TO_CHANGE = {"best", "patience", "keep_images", "on_too_few_images"}
"""Keys of a protocol that its scores do not depend on."""


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
    """Collective. Scores every complete checkpoint that has no score by this protocol, or `steps`,
    `again` if they have one.

    Yields each record when it is written; a step that another evaluator works on is left to it.
    Raises ConfigError, CheckpointError or DataError before anything is generated.  A checkpoint
    that is damaged or gone is refused when it is one of `steps`; otherwise it is named in the log
    and in `passed_over`, by step, and the others are scored.  Ends early when `stopping` on a rank.
    """
    passed_over = {} if passed_over is None else passed_over
    world = world or World()
    check_protocol(protocol)
    check_sampler(load_run_config(run_dir).diffusion.prediction, protocol.sampler)
    run_dir.complete_step(None)
    pending = [
        step for step in run_dir.pending_evaluations(protocol.name) if step not in passed_over
    ]
    wanted = (
        pending
        if steps is None
        else [run_dir.complete_step(step) for step in steps if again or step in pending]
    )
    wanted = broadcast_json(wanted)
    check_same_protocol(run_dir, protocol)
    if world.rank == 0:
        repair_best(run_dir, protocol)
        clean_scored_steps(run_dir, protocol.name)
    if not wanted:
        return
    run, extractors = (
        open_run(run_dir, device, protocol.guide),
        [load_extractor(entry, device) for entry in protocol.extractors],
    )
    check_enough(protocol, extractors)
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
    """On all ranks: what was generated until then is kept."""


class Evaluator:
    """Everything that the scores of a run by a protocol have in common."""

    def __init__(
        self,
        run: TrainedRun,
        protocol: EvaluateConfig,
        extractors: list[Extractor],
        reference: Reference,
        world: World,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run, self.protocol, self.extractors, self.reference, self.world = (
            run,
            protocol,
            extractors,
            reference,
            world,
        )
        self.stopping = stopping

    def score(self, step: int, *, again: bool) -> dict[str, Any] | None:
        """Collective. The record of one step, once it is written; None when that is not ours to do.

        Raises CheckpointError on all ranks, for a checkpoint that is damaged, or was removed in the
        meantime.
        """
        run_dir, protocol, rank0 = self.run.run_dir, self.protocol, self.world.rank == 0
        lease = Lease(run_dir.evaluation_lease(step, protocol.name))
        run_and_agree(lease.take, act=rank0)
        with lease if rank0 else nullcontext():
            done = (
                not again
                and step not in run_dir.pending_evaluations(protocol.name)
                and self._is_there(step)
            )
            if not broadcast_json(lease.held and not done):
                return None
            manifest = run_and_agree(partial(self._manifest, step)) or b""
            results, samples = self._results(step, self._work(step, manifest))
            if not rank0:
                return broadcast_json(None)
            record = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "samples_seen": step * self.run.config.batch.global_batch_size,
                "results": results,
                "samples": samples,
                "protocol": protocol.model_dump(mode="json"),
                "rules": RULES,
                "checkpoint_manifest_sha256": hashlib.sha256(manifest).hexdigest(),
                "data_fingerprint": self.run.index.fingerprint,
                "autoencoder_identity": self.run.index.autoencoder.identity,
                "extractors": {
                    extractor.config.label: extractor.identity() for extractor in self.extractors
                },
                "reference": self.reference.facts,
                "versions": {name: _version(name) for name in PACKAGES},
                "device": self.run.generator.device.type,
                "processes": self.world.world_size,
                "threads": torch.get_num_threads(),
                "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            publish_json(run_dir.evaluation(step, protocol.name), record)
            shutil.rmtree(self._work(step, manifest), ignore_errors=True)
            for warning in update_best(run_dir, protocol):
                log.warning("%s", warning)
            return broadcast_json(record)

    def _is_there(self, step: int) -> bool:
        return step in self.run.run_dir.complete_checkpoints()

    def _manifest(self, step: int) -> bytes:
        """Content of the checkpoint's manifest.  Raises CheckpointError."""
        folder = self.run.run_dir.checkpoint(step)
        if not self._is_there(step):
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
            if self._is_there(step):
                raise
            raise CheckpointError(
                f"{self.run.run_dir.checkpoint(step)}: was removed during its evaluation"
            ) from None

    def _work(self, step: int, manifest: bytes) -> Path:
        """Where features wait until the record is written; of another protocol or checkpoint they
        are not taken up again.
        """
        facts = [
            with_first_keys("EvaluateConfig", self.protocol.model_dump(mode="json")),
            [e.identity() for e in self.extractors],
            self.run.index.fingerprint,
        ]
        key = hashlib.sha256(json.dumps(facts).encode() + manifest).hexdigest()[:KEY_LENGTH]
        return self.run.run_dir.evaluation(step, self.protocol.name).with_suffix(f".{key}.partial")

    def _results(self, step: int, work: Path) -> tuple[list[dict[str, Any]], str | None]:
        """Collective. Entries of the record (on rank 0), and the sheet of samples."""
        protocol, results, samples = self.protocol, [], None
        for weights in protocol.weights:
            run_and_agree(partial(self._load, step, weights))
            for scale in protocol.guidance_scales:
                started, made = time.monotonic(), 0
                stores = [
                    FeatureStore(
                        work / f"{weights}_w{scale:g}_seed{protocol.seed + i}",
                        protocol.images,
                        protocol.batch_size,
                    )
                    for i in range(protocol.repeats)
                ]
                for seed, store in enumerate(stores, start=protocol.seed):
                    made += self._generate(
                        store, seed, scale, f"step {step}, {weights}, guidance {scale:g}"
                    )
                if any_over_ranks(self.stopping())[0]:  # waits for all ranks
                    raise Stopped
                if self.world.rank != 0:
                    continue
                shared = {"weights": weights, "guidance_scale": scale, "images": protocol.images}
                entries = over_seeds([self._scores(store) for store in stores])
                seconds = {"seconds": round(time.monotonic() - started, 2), "images_made_now": made}
                results += [{**shared, **entry, **seconds} for entry in entries]
                shown = stores[0]
                if protocol.keep_images != "none":
                    save_images(self.run, step, protocol, weights, scale, shown.rows(PIXELS))
                if (
                    protocol.grid_images
                    and samples is None
                    and scale == max(protocol.guidance_scales)
                ):
                    path = self.run.run_dir.samples(step, protocol.name)
                    publish_grid(path, shown.first(PIXELS, protocol.grid_images))
                    samples = str(path.relative_to(self.run.run_dir.path))
        return results, samples

    def _scores(self, store: FeatureStore) -> list[dict[str, Any]]:
        return [
            entry
            for extractor in self.extractors
            for entry in scores(self.protocol, extractor, store, self.reference)
        ]

    def _generate(self, store: FeatureStore, seed: int, scale: float, desc: str) -> int:
        """This rank's share of the pictures, and their features; how many there were left to make."""
        protocol, made = self.protocol, 0
        missing = store.missing(self.world.rank, self.world.world_size)
        with progress(sum(map(len, missing)), "img", desc) as bar:
            for batch in missing:
                if self.stopping():
                    break
                pixels = self.run.generator.pixels(
                    batch,
                    seed=seed,
                    sampler=protocol.sampler,
                    guidance_scale=scale,
                    precision=protocol.precision,
                )
                tensors: dict[str, Tensor] = {}
                for extractor in self.extractors:
                    label = extractor.config.label
                    tensors |= {f"{label}/{kind}": rows for kind, rows in extractor(pixels).items()}
                    if extractor.embed_text is not None and "clip_score" in protocol.metrics:
                        tensors[f"{label}/text"] = extractor.embed_text(
                            self.run.captions(seed, batch)
                        )
                shown = (
                    len(pixels)
                    if protocol.keep_images != "none"
                    else max(protocol.grid_images - batch.start, 0)
                )
                shown *= seed == protocol.seed
                if shown:
                    tensors[PIXELS] = pixels[:shown]
                store.put(batch, tensors)
                made += len(batch)
                bar.update(len(batch))
        return made


def check_enough(protocol: EvaluateConfig, extractors: list[Extractor]) -> None:
    """Fewer pictures than features: a warning, or ConfigError if the protocol says so."""
    if not {"fd", "spatial_fd", "fd_infinity"} & set(protocol.metrics):
        return
    for extractor in extractors:
        if extractor.config.kind != "clip" and protocol.images <= extractor.dimension:
            text = (
                f"images={protocol.images} for the {extractor.dimension} features of "
                f"{extractor.config.label}: a Frechet distance "
                "is biased upwards; compare only scores of the same protocol, or use kid, "
                "which is not"
            )
            if protocol.on_too_few_images == "refuse":
                raise ConfigError(f"{text} (on_too_few_images=refuse)")
            log.warning("%s", text)


def clean_scored_steps(run_dir: RunDir, protocol: str) -> None:
    """Remove leases and features of scored steps whose evaluator was killed, or could not remove
    them.
    """
    for record in run_dir.path.glob(f"evaluations/step_*/{protocol}.json"):
        lease = Lease(record.with_suffix(".lease"))
        features = list(record.parent.glob(f"{protocol}.{'[0-9a-f]' * KEY_LENGTH}.partial"))
        if (features or lease.path.exists()) and lease.take():
            for folder in features:
                shutil.rmtree(folder, ignore_errors=True)
            lease.release()


def check_same_protocol(run_dir: RunDir, protocol: EvaluateConfig) -> None:
    """Raises ConfigError when scores of this name were made by other settings: one curve must not
    mix two protocols.

    A record that cannot be read is named in the log; it counts as not there.
    """
    for path in sorted(run_dir.path.glob(f"evaluations/step_*/{protocol.name}.json")):
        try:
            record = read_record(path)
        except DataError as error:
            log.warning("%s: this score does not count; the step is scored again", error)
            continue
        if record["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: was written by another version (format {record['format_version']}, this "
                f"one {FORMAT_VERSION}): "
                f"give the protocol another name, such as name={protocol.name}_2, or remove the "
                "old scores"
            )
        stored = validate_stored(EvaluateConfig, record["protocol"], where=str(path))
        changed = {
            key: values
            for key, values in differences(stored, protocol).items()
            if key not in FREE_TO_CHANGE
        }
        if changed:
            lines = [
                f"  {key}: scored with {old!r}, you ask for {new!r}"
                for key, (old, new) in changed.items()
            ]
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
