"""The generated pictures themselves, where a protocol asks for them: a folder of PNGs, an .npz or a
WebDataset tar.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.evaluation.image_files import publish_npz, publish_pictures, publish_tar
from lpl_pretrain.evaluation.trained_run import TrainedRun


def save_images(
    run: TrainedRun,
    step: int,
    protocol: EvaluateConfig,
    weights: str,
    scale: float,
    pixels: Iterable[Tensor],
) -> None:
    """samples/step_*_<protocol>_<weights>_w<scale>, one batch in memory at a time."""
    path = run.run_dir.samples(step, f"{protocol.name}_{weights}_w{scale:g}")
    if protocol.keep_images == "npz":
        side = run.index.resolution_px
        publish_npz(path.with_name(f"{path.stem}.npz"), pixels, (protocol.images, side, side, 3))
        return
    shared = {
        "run": str(run.run_dir.path),
        "step": step,
        "seed": protocol.seed,
        "guidance_scale": scale,
        "weights": weights,
    }
    facts = [
        {**shared, **fact} for fact in run.sample_metadata(protocol.seed, range(protocol.images))
    ]
    if protocol.keep_images == "png":
        publish_pictures(path.with_name(path.stem), pixels, facts)
    else:
        publish_tar(path.with_name(f"{path.stem}.tar"), pixels, facts)
