"""Which protocols can run: relations inside an evaluation protocol, and between it and the run that it scores.

Nothing here needs torch, so that a protocol is refused before it costs an allocation.
"""

from __future__ import annotations

from pathlib import Path

from lpl_pretrain.config.protocol import EvaluateConfig, SamplerConfig
from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.errors import ConfigError

DISCRETE, FLOW = ("ddim", "dpmpp_2m"), ("euler", "heun")
SAMPLERS = {Prediction.EPS: DISCRETE, Prediction.V: DISCRETE, Prediction.FLOW: FLOW}
DISCRETE_TIMESTEPS = 1000

FID_WEIGHTS_SHA256_START = "6726825d"
FID_WEIGHTS_HELP = (
    "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth "
    "(91 MiB; sha256 begins 6726825d; torch-fidelity's weights-inception-2015-12-05-6726825d.pth serves too), put it anywhere, "
    "such as ~/weights/, and set inception_weights to its path; or set extractor=efficientnet_lite0, which needs no download"
)


def check_sampler(prediction: Prediction, sampler: SamplerConfig) -> None:
    """Raises ConfigError when `sampler` cannot follow what the denoiser predicts."""
    if sampler.kind not in SAMPLERS[prediction]:
        raise ConfigError(
            f"sampler.kind={sampler.kind} with a denoiser trained with diffusion.prediction={prediction.value}: "
            f"use {' or '.join(SAMPLERS[prediction])}"
        )
    if sampler.kind in DISCRETE and sampler.steps > DISCRETE_TIMESTEPS:
        raise ConfigError(
            f"sampler.steps={sampler.steps} with sampler.kind={sampler.kind}: its schedule has {DISCRETE_TIMESTEPS} timesteps; "
            "use at most that many"
        )
    if sampler.kind in DISCRETE and sampler.shift != 1.0:
        raise ConfigError(
            f"sampler.shift={sampler.shift} with sampler.kind={sampler.kind}: it is for {' and '.join(FLOW)}; set it to 1"
        )


def check_protocol(protocol: EvaluateConfig) -> None:
    """Raises ConfigError for what the schema cannot see in one value."""
    if protocol.images < 2:
        raise ConfigError(f"images={protocol.images}: a covariance needs at least 2, and a score that means something thousands")
    if not protocol.guidance_scales:
        raise ConfigError("guidance_scales=[]: give at least one; 1.0 is no guidance")
    if "/" in protocol.name or protocol.name.startswith("."):
        raise ConfigError(
            f"name={protocol.name!r}: it becomes a file name, evaluations/step_*/<name>.json; use letters, digits, - and _"
        )
    if protocol.extractor != "inception":
        return
    if protocol.inception_weights is None:
        raise ConfigError(f"inception_weights=null with extractor=inception: {FID_WEIGHTS_HELP}")
    if not Path(protocol.inception_weights).expanduser().is_file():
        raise ConfigError(f"inception_weights={protocol.inception_weights}: no such file: {FID_WEIGHTS_HELP}")
