"""Charts of a training run, by section of the page."""

from __future__ import annotations

from lpl_pretrain.report.charts import Chart
from lpl_pretrain.report.record import RunRecord, Series

PHASES = ("data", "forward", "lpl", "backward", "optimizer", "checkpoint")
"""Phases of an update, `seconds/<phase>` in the log; as many as there are colours."""
WEIGHTED = "mean squared error, weighted as configured"
MINIMISED = "what the optimizer minimises; its scale moves with the weight of LPL"

Section = tuple[str, str, list[Chart]]
"""Title, text in place of the charts when none has a line, charts."""


def training_charts(record: RunRecord) -> list[Section]:
    """Sections of the page, in order."""
    return [losses(record), perceptual(record), optimisation(record)]


def losses(record: RunRecord) -> Section:
    """Diffusion loss and total loss."""
    return (
        "Loss",
        "No losses logged.",
        [
            Chart(
                "Diffusion loss",
                {"loss": record.series("loss/diffusion")},
                unit="loss",
                log=True,
                note=WEIGHTED,
            ),
            Chart(
                "Total loss",
                {"loss": record.series("loss/total")},
                unit="loss",
                log=True,
                note=MINIMISED,
            ),
        ],
    )


def perceptual(record: RunRecord) -> Section:
    """The Latent Perceptual Loss: value, fractions, and its decoder stages."""
    missing = "This run trains without the Latent Perceptual Loss (lpl: null)."
    if record.settings.get("lpl"):
        missing = "The Latent Perceptual Loss has not started yet."
    fractions = {
        "LPL / total loss": record.series("lpl/weighted_share"),
        "gated samples / all": record.series("lpl/gated_share"),
    }
    return (
        "Latent Perceptual Loss",
        missing,
        [
            Chart(
                "LPL",
                {"lpl": record.series("loss/lpl")},
                unit="loss",
                log=True,
                note="unweighted, mean over the batch",
            ),
            Chart(
                "LPL fractions",
                _logged(fractions),
                unit="fraction",
                percent=True,
                from_zero=True,
                note="weighted LPL over total loss; samples that pass the gate over all samples",
            ),
            Chart(
                "LPL by decoder stage",
                record.stages("contribution"),
                unit="contribution to LPL",
                log=True,
                note="unweighted, mean over the samples with LPL",
            ),
            Chart(
                "Feature standard deviation, predicted / clean",
                record.stages("std_ratio"),
                unit="ratio",
                baseline=1.0,
                note="over space, by decoder stage; below 1 the estimate is blurrier than the data",
            ),
            Chart(
                "Positions kept by the outlier mask",
                record.stages("keep_fraction"),
                unit="fraction",
                percent=True,
                note="by decoder stage",
            ),
        ],
    )


def optimisation(record: RunRecord) -> Section:
    """Gradient norm, throughput, time and arithmetic of an update."""
    phases = _logged({name: record.series(f"seconds/{name}") for name in PHASES})
    return (
        "Optimisation",
        "No gradient norms or throughput logged.",
        [
            Chart(
                "Gradient norm",
                {"norm": record.series("grad_norm")},
                unit="L2 norm",
                log=True,
                note="before clipping",
            ),
            Chart(
                "Throughput",
                {"samples / s": record.series("samples_per_s")},
                unit="samples / s",
                from_zero=True,
                note="all ranks together",
            ),
            Chart(
                "Time of a step by phase",
                phases,
                unit="seconds",
                from_zero=True,
                note="data and checkpoint on the host, the other phases on the device",
            ),
            Chart(
                "Arithmetic throughput",
                {"TFLOP / s": record.series("tflops_per_s")},
                unit="TFLOP / s",
                from_zero=True,
                note="of one device; recomputation is not counted",
            ),
            Chart(
                "Model FLOPs utilisation",
                {"MFU": record.series("mfu")},
                unit="fraction of peak",
                percent=True,
                from_zero=True,
                note="arithmetic throughput over the device's peak",
            ),
        ],
    )


def _logged(lines: dict[str, Series]) -> dict[str, Series]:
    """Lines that have values."""
    return {name: series for name, series in lines.items() if series}
