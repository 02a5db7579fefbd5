"""Warnings at the start of training: data that a run does not use, and a ramp of LPL that does not
end.
"""

from __future__ import annotations

from collections.abc import Iterator

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.online_text import stored_encoders
from lpl_pretrain.config.schema import TrainConfig


def start_notes(config: TrainConfig, index: DatasetIndex) -> list[str]:
    """One line for each; empty for a run that uses what its data hold."""
    return [*_data_notes(config, index), *_lpl_notes(config)]


def _data_notes(config: TrainConfig, index: DatasetIndex) -> Iterator[str]:
    model = config.model
    if index.flipped and not config.data.flips:
        yield (
            "data.flips=false: the flipped latents that the data hold are not used; "
            "data.flips=true uses them"
        )
    if model.reads_text:
        unused = sorted(set(index.text) - set(stored_encoders(config.conditioning)))
        if unused:
            yield (
                "conditioning.text_encoders: the stored embeddings by "
                f"{', '.join(unused)} are not used"
            )
        if index.captions < index.samples:
            missing = 1 - index.captions / index.samples
            yield (
                f"captions: {missing:.2%} of the samples ({index.samples - index.captions} of "
                f"{index.samples}) have none; they are trained with the null text"
            )
    elif index.text or index.captions:
        stored = f"embeddings by {', '.join(sorted(index.text))}" if index.text else "captions"
        yield (
            f"model.kind={model.kind}: this model reads no text; the {stored} that the data hold "
            "are not used"
        )
    if index.classes and not model.reads_classes:
        yield (
            f"model.kind={model.kind}: this model reads no classes; the {len(index.classes)} "
            "classes of the data are not used"
        )


def _lpl_notes(config: TrainConfig) -> Iterator[str]:
    lpl = config.lpl
    if lpl is None or not lpl.ramp_steps:
        return
    first = lpl.first_weighted_step
    if first + lpl.ramp_steps > config.steps:
        reached = (config.steps - first) / lpl.ramp_steps
        yield (
            f"lpl.ramp_steps={lpl.ramp_steps} from step {first:g} on with steps={config.steps}: "
            f"the weight of LPL reaches {reached:.0%} of its value only"
        )
