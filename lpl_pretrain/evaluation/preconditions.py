"""Checks before a protocol scores a run, and clean-up after evaluators that were killed."""

from __future__ import annotations

import shutil

from lpl_pretrain.config.extractors import EXTRACTORS
from lpl_pretrain.config.load import differences, validate_stored
from lpl_pretrain.config.metrics import METRICS
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.records import FORMAT_VERSION, read_record
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.log import log

WORK_KEY_LENGTH = 12
"""Hexadecimal digits in the name of a folder of features, <protocol>.<key>.partial."""
NOT_IN_SCORES = {"best", "patience", "keep_images", "on_too_few_images"}
"""Keys of a protocol that its scores do not depend on."""


def check_enough_images(protocol: EvaluateConfig, extractors: list[Extractor]) -> None:
    """Warn about fewer images than features; ConfigError if `on_too_few_images` is refuse."""
    biased = [METRICS[name] for name in protocol.metrics if METRICS[name].biased_by_few_images]
    for extractor in extractors:
        outputs = EXTRACTORS[extractor.config.kind].outputs
        if protocol.images > extractor.dimension or "joint" in outputs or not biased:
            continue
        text = (
            f"images={protocol.images} for the {extractor.dimension} features of "
            f"{extractor.config.label}: a Frechet distance is biased upwards; compare only scores "
            "of the same protocol, or use kid, which is not"
        )
        if protocol.on_too_few_images == "refuse":
            raise ConfigError(f"{text} (on_too_few_images=refuse)")
        log.warning("%s", text)


def check_same_protocol(run_dir: RunDir, protocol: EvaluateConfig) -> None:
    """Raise ConfigError when scores of this name are by other settings: one curve, one protocol.

    A record that cannot be read is named in the log, and ignored.
    """
    for path in sorted(run_dir.path.glob(f"evaluations/step_*/{protocol.name}.json")):
        try:
            record = read_record(path)
        except DataError as error:
            log.warning("%s: this score is ignored; the step is scored again", error)
            continue
        remedy = f"give the protocol another name, such as name={protocol.name}_2"
        if record["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: was written by another version (format {record['format_version']}, this "
                f"one writes {FORMAT_VERSION}): {remedy}, or remove the old scores"
            )
        stored = validate_stored(EvaluateConfig, record["protocol"], where=str(path))
        changed = [
            f"  {key}: scored with {old!r}, now {new!r}"
            for key, (old, new) in differences(stored, protocol).items()
            if key not in NOT_IN_SCORES
        ]
        if changed:
            lines = "\n".join(changed)
            raise ConfigError(
                f"{path} was scored by another protocol of the same name:\n{lines}\n{remedy}, or "
                "set these keys back"
            )


def clean_scored_steps(run_dir: RunDir, protocol: str) -> None:
    """Remove leases and features of scored steps, which a killed evaluator left behind."""
    for record in run_dir.path.glob(f"evaluations/step_*/{protocol}.json"):
        lease = Lease(record.with_suffix(".lease"))
        pattern = f"{protocol}.{'[0-9a-f]' * WORK_KEY_LENGTH}.partial"
        leftovers = list(record.parent.glob(pattern))
        if (leftovers or lease.path.exists()) and lease.take():
            for folder in leftovers:
                shutil.rmtree(folder, ignore_errors=True)
            lease.release()
