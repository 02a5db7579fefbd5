"""The `init_from` section: initial weights from another run, a file or a diffusers folder; checked
without torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

from pydantic import Field, PositiveInt, model_validator

from lpl_pretrain.config.base import Name, PathText, Section
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
REMEDY = (
    'pickles are never read here; convert it where you trust it: python -c "import torch, '
    "safetensors.torch as s; s.save_file(torch.load('IN', weights_only=True), 'OUT.safetensors')\""
)
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


class InitConfig(Section):
    """Source of the initial weights: exactly one of run, file and diffusers."""

    run: Optional[PathText] = None
    """Run directory of another run, such as the one that post-training with LPL starts from."""
    step: Optional[PositiveInt] = None
    """Step of a complete checkpoint of `run`; absent: the newest."""
    weights: Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.[0-9]{3})$")] = "ema"
    """Weights of `run`: ema, raw, or a power-function average that it tracks."""
    file: Optional[PathText] = None
    """Safetensors file with our parameter names (for a DiT the published ones): written by
    `lpl-pretrain export`, or a converted DiT-XL-2-256x256.pt.
    """
    diffusers: Optional[PathText] = None
    """Folder of a transformer or U-Net with its config.json, as diffusers saves it."""
    allow_mismatch: tuple[Name, ...] = ()
    """Prefixes of parameter names that may be missing or have another shape: those parameters keep
    their random initial values.
    """

    @model_validator(mode="after")
    def _exactly_one(self) -> InitConfig:
        found = [name for name in ("run", "file", "diffusers") if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(f"set exactly one of run, file, diffusers; found {found or 'none'}")
        if self.run is None and (self.step is not None or self.weights != "ema"):
            raise ValueError(
                f"step={self.step}, weights={self.weights}: they say which of a run's weights, and "
                "no run is named"
            )
        return self


def initial_problems(init: InitConfig | None) -> list[str]:
    """Problems that show without reading the weights."""
    if init is None:
        return []
    if init.run is not None:
        try:
            RunDir(Path(init.run)).complete_step(init.step)
        except CheckpointError as problem:
            return [f"init_from.run={init.run}: {problem}"]
        return []
    if init.file is not None:
        if Path(init.file).suffix in PICKLES:
            return [f"init_from.file={init.file}: {REMEDY}"]
        return (
            []
            if os.path.isfile(init.file)
            else [f"init_from.file={init.file}: no such file, wanted a .safetensors"]
        )
    folder = Path(init.diffusers or "")
    if not os.path.isfile(folder / "config.json"):
        return [
            f"init_from.diffusers={folder}: has no config.json; name the transformer's own folder"
        ]
    if diffusers_files(folder):
        return []
    pickled = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
    return [
        f"init_from.diffusers={folder}: has no {DIFFUSERS_WEIGHTS}"
        + (f", only {pickled[0]}: {REMEDY}" if pickled else "")
    ]


def diffusers_files(folder: Path) -> list[Path]:
    """The weights of a diffusers model, in one file or several; empty when there are none."""
    whole = folder / DIFFUSERS_WEIGHTS
    return (
        [whole]
        if os.path.isfile(whole)
        else sorted(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    )
