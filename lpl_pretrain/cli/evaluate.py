"""`lpl-pretrain evaluate RUN PROTOCOL`: scores what is not scored yet, and a small table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir


def run(run: str, protocol: str, overrides: list[str], step: int | None) -> None:
    settings = load_config(EvaluateConfig, protocol, overrides)
    from lpl_pretrain.evaluation.job import evaluate  # torch: not for --help

    records = evaluate(RunDir(Path(run)), settings, None if step is None else [step])
    if not records:
        print(f"{run}: every complete checkpoint has its score by protocol {settings.name}; --step N scores one again")
        return
    print("\n".join(table(records)))


def table(records: list[dict[str, Any]]) -> list[str]:
    """One line a step, one column a guidance scale."""
    first, metric = records[0], records[0]["results"][0]["metric"]
    scales = [result["guidance_scale"] for result in first["results"]]
    lines = [
        f"{metric} (lower is better), {first['results'][0]['images']} pictures, {first['weights']} weights",
        f"{'step':>10}" + "".join(f"{f'w={scale:g}':>12}" for scale in scales),
    ]
    lines += [f"{record['step']:>10,}" + "".join(f"{result['value']:>12.2f}" for result in record["results"]) for record in records]
    dimension, images = first["extractor"]["dimension"], first["results"][0]["images"]
    if images <= dimension:
        lines.append(f"{images} pictures for {dimension} features: biased upwards; compare only scores of the same protocol")
    return lines
