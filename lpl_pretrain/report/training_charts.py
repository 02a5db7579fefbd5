"""Which curves of a run are drawn, by section."""

from __future__ import annotations

from lpl_pretrain.report.charts import Chart
from lpl_pretrain.report.record import RunRecord, Series

PHASES = (
    "data",
    "forward",
    "lpl",
    "backward",
    "optimizer",
    "checkpoint",
)  # as many as there are colours
Section = tuple[str, str, list[Chart]]
"""Title, what to say when no chart has a line, charts."""


def training_charts(record: RunRecord) -> list[Section]:
    return [losses(record), perceptual(record), optimisation(record)]


def losses(record: RunRecord) -> Section:
    one = record.series
    weighted = "mean squared error, weighted as configured"
    minimised = "what the optimizer minimises; its scale moves with LPL's weight"
    return (
        "Loss",
        "No losses logged.",
        [
            Chart("Diffusion loss", {"loss": one("loss/diffusion")}, log=True, note=weighted),
            Chart("Total loss", {"loss": one("loss/total")}, log=True, note=minimised),
        ],
    )


def perceptual(record: RunRecord) -> Section:
    one = record.series
    shares = {
        "of the loss": one("lpl/weighted_share"),
        "of samples, gated in": one("lpl/gated_share"),
    }
    spread = "standard deviation over space; below 1 the estimate is blurrier than the data"
    return (
        "Latent Perceptual Loss",
        "The Latent Perceptual Loss has not started yet."
        if record.settings.get("lpl")
        else "This run trains without the Latent Perceptual Loss (lpl: null).",
        [
            Chart(
                "LPL", {"lpl": one("loss/lpl")}, log=True, note="unweighted, mean over the batch"
            ),
            Chart(
                "Shares",
                _present(shares),
                percent=True,
                from_zero=True,
                note="LPL's share of the total loss; share of samples that pass the gate",
            ),
            Chart("Contribution of each decoder stage", record.stages("contribution"), log=True),
            Chart(
                "Feature spread, predicted / clean",
                record.stages("std_ratio"),
                baseline=1.0,
                note=spread,
            ),
            Chart(
                "Positions kept by the outlier mask", record.stages("keep_fraction"), percent=True
            ),
        ],
    )


def optimisation(record: RunRecord) -> Section:
    one = record.series
    phases = _present({name: one(f"seconds/{name}") for name in PHASES})
    return (
        "Optimisation",
        "No gradient norms or rates logged.",
        [
            Chart("Gradient norm", {"norm": one("grad_norm")}, log=True, note="before clipping"),
            Chart(
                "Throughput",
                {"samples / s": one("samples_per_s")},
                from_zero=True,
                note="samples per second, all ranks",
            ),
            Chart(
                "Seconds a step",
                phases,
                from_zero=True,
                note="by phase: data and checkpoints on the host, the rest on the device",
            ),
            Chart(
                "Arithmetic",
                {"TFLOP / s": one("tflops_per_s")},
                from_zero=True,
                note="of one device; recomputation not counted",
            ),
            Chart(
                "Model FLOPs utilisation",
                {"MFU": one("mfu")},
                percent=True,
                from_zero=True,
                note="of the device's peak",
            ),
        ],
    )


def _present(lines: dict[str, Series]) -> dict[str, Series]:
    return {name: series for name, series in lines.items() if series}
