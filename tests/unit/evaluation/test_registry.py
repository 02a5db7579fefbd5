"""Metrics and extractors are added by one spec each: everything else reads the two lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lpl_pretrain.config import extractors, metrics
from lpl_pretrain.config.extractors import ExtractorInfo
from lpl_pretrain.config.metrics import MetricInfo, Score, find_score, higher_is_better, score_title
from lpl_pretrain.evaluation import evaluator, registry
from lpl_pretrain.evaluation.extractor import ExtractorSpec
from lpl_pretrain.evaluation.metric import Estimate, MetricSpec
from lpl_pretrain.report.compare import find_runs, write_comparison
from lpl_pretrain.report.page import write_report
from tests.support.tiny_run import color_means_extractor

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def add_metric(monkeypatch, spec):
    monkeypatch.setitem(metrics.METRICS, spec.info.name, spec.info)
    monkeypatch.setitem(registry.METRICS, spec.info.name, spec)


def add_extractor(monkeypatch, spec):
    monkeypatch.setitem(extractors.EXTRACTORS, spec.info.kind, spec.info)
    monkeypatch.setitem(registry.EXTRACTORS, spec.info.kind, spec)


BRIGHTNESS = MetricSpec(
    MetricInfo(
        "brightness", "features", (Score("brightness", "Mean feature", higher_is_better=True),)
    ),
    lambda inputs: [Estimate(inputs.generated_features().double().mean().item())],
)
COLOR_MEANS = ExtractorSpec(
    ExtractorInfo("color_means", frozenset({"features"}), "package"), color_means_extractor
)


def test_a_new_metric_is_scored_recorded_compared_and_reported(run, monkeypatch):
    """One spec and one entry do it, for an extractor too."""
    add_metric(monkeypatch, BRIGHTNESS)
    add_extractor(monkeypatch, COLOR_MEANS)
    name = f"brightness{color_means_extractor(None, CPU).suffix}"
    protocol = run.protocol(
        metrics=["fd", "brightness"], extractors=[{"kind": "color_means"}], best=name
    )
    records = list(evaluator.evaluate(run.run_dir, protocol, CPU))
    for record in records:
        assert [entry["metric"] for entry in record["results"]].count(name) == 2  # guidance scales
    values = [
        entry["value"]
        for record in records
        for entry in record["results"]
        if entry["metric"] == name
    ]
    best = run.run_dir.best(protocol.name).read_text()
    assert f'"metric": "{name}"' in best and f'"value": {max(values)}' in best
    for page in (write_report(run.run_dir), write_comparison(find_runs([run.run_dir.path]))):
        text = page.read_text()
        assert (
            "Mean feature (averages)" in text and f"{name}" in text and "higher is better" in text
        )


def test_lists_of_configuration_and_code_agree():
    assert {name: spec.info for name, spec in registry.METRICS.items()} == metrics.METRICS
    assert {kind: spec.info for kind, spec in registry.EXTRACTORS.items()} == extractors.EXTRACTORS


def test_every_metric_and_extractor_is_in_the_documentation():
    words = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "evaluation.md").read_text()))
    assert metrics.METRICS.keys() | extractors.EXTRACTORS.keys() <= words


@pytest.mark.parametrize(
    "name, title, higher",
    [
        ("fid", "Frechet Inception Distance", False),
        ("sfid", "Spatial FID", False),
        ("fid_infinity", "FID-infinity", False),
        ("kid", "Kernel Inception Distance", False),
        ("fd_efficientnet_lite0", "Frechet distance (efficientnet_lite0)", False),
        ("fd_infinity_vit", "Frechet distance at infinitely many images (vit)", False),
        ("precision", "Precision", True),
        ("recall_vit", "Recall (vit)", True),
        ("inception_score_inception_0123abcd", "Inception Score (inception_0123abcd)", True),
        ("clip_score", "CLIPScore", True),
        ("of_another_version", "Of another version", False),
    ],
)
def test_titles_and_directions_of_recorded_names(name, title, higher):
    assert score_title(name) == title and higher_is_better(name) is higher


def test_names_of_scores_are_unique():
    """No score's name is another's, or what the field calls another's."""
    names = [score.name for info in metrics.METRICS.values() for score in info.scores]
    assert len(set(names)) == len(names)
    assert find_score("unknown") is None and find_score("fdx") is None
