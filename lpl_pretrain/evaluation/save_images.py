"""Saves the generated images, where a protocol asks for them: PNGs, an .npz or a WebDataset tar."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.evaluation.image_files import write_npz, write_pngs, write_tar
from lpl_pretrain.evaluation.trained_run import TrainedRun


def save_images(
    run: TrainedRun,
    step: int,
    protocol: EvaluateConfig,
    weights: str,
    scale: float,
    pixels: Iterable[Tensor],
) -> None:
    """Write samples/step_*_<protocol>_<weights>_w<scale>, with one batch in memory at a time.

    `pixels`: batches, uint8 (N, 3, H, W).
    """
    path = run.run_dir.samples(step, f"{protocol.name}_{weights}_w{scale:g}")
    if protocol.keep_images == "npz":
        side = run.index.resolution_px
        write_npz(path.with_name(f"{path.stem}.npz"), pixels, (protocol.images, side, side, 3))
        return
    shared = {
        "run": str(run.run_dir.path),
        "step": step,
        "seed": protocol.seed,
        "guidance_scale": scale,
        "weights": weights,
    }
    samples = run.sample_metadata(protocol.seed, range(protocol.images))
    metadata = [{**shared, **sample} for sample in samples]
    if protocol.keep_images == "png":
        write_pngs(path.with_name(path.stem), pixels, metadata)
    else:
        write_tar(path.with_name(f"{path.stem}.tar"), pixels, metadata)
