"""Which protocols can run: relations inside an evaluation protocol, and between it and the run that
it scores.

Nothing here needs torch, so that a protocol is refused before it costs an allocation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lpl_pretrain.config.protocol import EvaluateConfig, ExtractorConfig, SamplerConfig
from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.errors import ConfigError

DISCRETE, FLOW = ("ddim", "dpmpp_2m"), ("euler", "heun")
SAMPLERS = {Prediction.EPS: DISCRETE, Prediction.V: DISCRETE, Prediction.FLOW: FLOW}
DISCRETE_TIMESTEPS = 1000

ONLY_OF = {
    "spatial_fd": {"inception"},
    "inception_score": {"inception"},
    "cmmd": {"clip"},
    "clip_score": {"clip"},
}
"""Metric -> kinds of extractors; the others are for every kind but clip."""

FID_WEIGHTS_SHA256_START = "6726825d"
FID_WEIGHTS_HELP = (
    "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth "
    "(91 MiB; sha256 begins 6726825d; torch-fidelity's weights-inception-2015-12-05-6726825d.pth "
    "serves too), put it anywhere, "
    "such as ~/weights/, and set the extractor's weights to its path; or use kind: "
    "efficientnet_lite0, which needs no download"
)


def higher_is_better(metric: str) -> bool:
    """`metric`: as a record calls it."""
    return metric.startswith(
        ("inception_score", "precision", "recall", "density", "coverage", "clip_score")
    )


def check_sampler(prediction: Prediction, sampler: SamplerConfig) -> None:
    """Raises ConfigError when `sampler` cannot follow what the denoiser predicts."""
    if sampler.kind not in SAMPLERS[prediction]:
        raise ConfigError(
            f"sampler.kind={sampler.kind} with a denoiser trained with "
            f"diffusion.prediction={prediction.value}: "
            f"use {' or '.join(SAMPLERS[prediction])}"
        )
    if sampler.kind in DISCRETE and sampler.steps > DISCRETE_TIMESTEPS:
        raise ConfigError(
            f"sampler.steps={sampler.steps} with sampler.kind={sampler.kind}: its schedule has "
            f"{DISCRETE_TIMESTEPS} timesteps; "
            "use at most that many"
        )
    if sampler.kind in DISCRETE and sampler.shift != 1.0:
        raise ConfigError(
            f"sampler.shift={sampler.shift} with sampler.kind={sampler.kind}: it is for "
            f"{' and '.join(FLOW)}; set it to 1"
        )


def check_protocol(protocol: EvaluateConfig) -> None:
    """Raises ConfigError that lists what the schema cannot see in one value."""
    problems = [*_numbers(protocol), *_metrics(protocol)]
    for extractor in protocol.extractors:
        problems += extractor_problems(extractor)
    if problems:
        raise ConfigError("\n".join(problems))


def extractor_problems(extractor: ExtractorConfig) -> list[str]:
    """Where its weights are not, and what to do about it."""
    where, kind, weights = f"extractors.{extractor.label}", extractor.kind, extractor.weights
    if kind == "efficientnet_lite0":
        return []
    if kind == "timm" and extractor.network is None:
        return [
            f"{where}: kind=timm wants network, timm's name of it, such as vit_large_patch14_dinov2"
        ]
    help_of = {
        "inception": FID_WEIGHTS_HELP,
        "timm": f"save timm's {extractor.network} as .safetensors, put it anywhere, and set "
        "weights to its path",
        "clip": "set weights to a folder of a CLIPModel and its tokenizer, as transformers' "
        "save_pretrained writes them",
    }
    if weights is None:
        return [f"{where}.weights=null with kind={kind}: {help_of[kind]}"]
    path = Path(weights)
    if not (os.path.isdir(path) if kind == "clip" else os.path.isfile(path)):
        return [
            f"{where}.weights={weights}: no such {'folder' if kind == 'clip' else 'file'}: "
            f"{help_of[kind]}"
        ]
    if kind == "timm" and path.suffix != ".safetensors":
        return [
            f"{where}.weights={weights}: wanted .safetensors; other formats may run code when "
            "they are read"
        ]
    return []


def metrics_of(extractor: ExtractorConfig, metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` that make sense on its features, in their order."""
    return [
        name
        for name in metrics
        if extractor.kind in ONLY_OF.get(name, {"efficientnet_lite0", "inception", "timm"})
    ]


def _numbers(protocol: EvaluateConfig) -> list[str]:
    problems = []
    if protocol.images < 2:
        problems.append(
            f"images={protocol.images}: a covariance needs at least 2, and a score that means "
            "something thousands"
        )
    if protocol.bootstrap and protocol.repeats > 1:
        problems.append(
            f"bootstrap={protocol.bootstrap} with repeats={protocol.repeats}: two error bars for "
            "one score; leave one out"
        )
    for key in ("guidance_scales", "weights", "extractors", "metrics"):
        values = getattr(protocol, key)
        if not values:
            problems.append(f"{key}=[]: give at least one")
        if len(set(map(str, values))) < len(values):
            problems.append(f"{key}={values}: one is named twice")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", protocol.name):
        problems.append(
            f"name={protocol.name!r}: it becomes a file name, evaluations/step_*/<name>.json; use "
            "letters, digits, - and _"
        )
    return problems


def _metrics(protocol: EvaluateConfig) -> list[str]:
    labels = [extractor.label for extractor in protocol.extractors]
    problems = [
        f"extractors: two are called {label}; give one a name"
        for label in {x for x in labels if labels.count(x) > 1}
    ]
    for metric in protocol.metrics:
        if not any(metrics_of(extractor, [metric]) for extractor in protocol.extractors):
            kinds = " or ".join(sorted(ONLY_OF.get(metric, {"any but clip"})))
            problems.append(
                f"metrics: {metric} wants an extractor of kind {kinds}; there are {labels}"
            )
    return problems
