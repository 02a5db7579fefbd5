"""Checks relations between the keys of an evaluation protocol, and between it and the run that
it scores.

Nothing here needs torch, so that a protocol is refused before it costs an allocation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lpl_pretrain.config.extractors import EXTRACTORS, TIMM
from lpl_pretrain.config.metrics import METRICS
from lpl_pretrain.config.protocol import EvaluateConfig, ExtractorConfig, SamplerConfig
from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.errors import ConfigError

DISCRETE, FLOW = ("ddim", "dpmpp_2m"), ("euler", "heun")
SAMPLERS = {Prediction.EPS: DISCRETE, Prediction.V: DISCRETE, Prediction.FLOW: FLOW}
DISCRETE_TIMESTEPS = 1000


def check_sampler(prediction: Prediction, sampler: SamplerConfig) -> None:
    """Raises ConfigError when `sampler` cannot follow what the denoiser predicts."""
    if sampler.kind not in SAMPLERS[prediction]:
        raise ConfigError(
            f"sampler.kind={sampler.kind} with a denoiser trained with "
            f"diffusion.prediction={prediction.value}: use {' or '.join(SAMPLERS[prediction])}"
        )
    if sampler.kind in DISCRETE and sampler.steps > DISCRETE_TIMESTEPS:
        raise ConfigError(
            f"sampler.steps={sampler.steps} with sampler.kind={sampler.kind}: its schedule has "
            f"{DISCRETE_TIMESTEPS} timesteps; use at most that many"
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
    """Says which weights are not where the configuration says, and what to do about it."""
    info, weights = EXTRACTORS[extractor.kind], extractor.weights
    key = f"extractors.{extractor.label}"
    if info.weights == "package":
        return []
    if info.needs_network and extractor.network is None:
        return [
            f"{key}: kind={info.kind} needs network, {info.kind}'s name of it, such as "
            "vit_large_patch14_dinov2"
        ]
    remedy = info.weights_help.format(network=extractor.network)
    if weights is None:
        return [f"{key}.weights=null with kind={info.kind}: {remedy}"]
    path = Path(weights)
    if not (os.path.isdir(path) if info.weights == "folder" else os.path.isfile(path)):
        return [f"{key}.weights={weights}: no such {info.weights}: {remedy}"]
    if info is TIMM and path.suffix != ".safetensors":
        return [
            f"{key}.weights={weights}: wanted .safetensors; other formats may run code when they "
            "are read"
        ]
    return []


def metrics_of(extractor: ExtractorConfig, metrics: Sequence[str]) -> list[str]:
    """Select the metrics that can be computed from this extractor's outputs; keeps their order."""
    outputs = EXTRACTORS[extractor.kind].outputs
    return [name for name in metrics if METRICS[name].output in outputs]


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
            output = METRICS[metric].output
            kinds = " or ".join(
                sorted(kind for kind, info in EXTRACTORS.items() if output in info.outputs)
            )
            problems.append(
                f"metrics: {metric} wants an extractor of kind {kinds}; there are {labels}"
            )
    return problems
