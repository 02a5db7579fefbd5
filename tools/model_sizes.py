"""Print the table of docs/models.md: parameters and multiply-adds of all named model sizes.

    python tools/model_sizes.py

All are counted on meta tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import (
    DIT_SIZES,
    MMDIT_SIZES,
    UNETS,
    DiTConfig,
    MMDiTConfig,
    ModelConfig,
    UNetConfig,
)
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.planning.flops import count_flops

CLIPS = TextShape(77, 2048, 1280)
SD3 = TextShape(154, 4096, 2048)


def rows() -> Iterator[tuple[str, ModelConfig, int, int, TextShape | None]]:
    """(name, config section, latent channels, latent side, text shape) of each size."""
    for size in DIT_SIZES:
        for patch in (2, 4, 8):
            yield (
                f"DiT-{size}/{patch}",
                DiTConfig.model_validate(
                    {"size": size, "patch_size": patch, "learned_sigma": True}
                ),
                4,
                32,
                None,
            )
    for size in MMDIT_SIZES:
        side, channels = (128, 16) if size.endswith("B") and size != "B" else (32, 4)
        yield (
            f"MMDiT-{size}/2",
            MMDiTConfig.model_validate({"size": size, "qk_norm": True}),
            channels,
            side,
            SD3,
        )
    text = {"ldm": None, "sd": TextShape(77, 768, 0), "sdxl": CLIPS}
    for preset in UNETS:
        channels, side = {"ldm": (3, 64), "sd": (4, 64), "sdxl": (4, 128)}[preset]
        yield (
            f"U-Net {preset}",
            UNetConfig.model_validate({"preset": preset}),
            channels,
            side,
            text[preset],
        )


def main() -> None:
    print("| model | latent | parameters, M | GMAC of a forward |\n|---|---|---|---|")
    for name, section, channels, side, text in rows():
        latent = LatentEntry(
            channels=channels, height=side, width=side, mean=[0.0] * channels, std=[1.0] * channels
        )
        with torch.device("meta"):
            model = build_denoiser(section, latent, num_classes=1000, text=text)
            z_t = torch.empty(1, channels, side, side)
            t = torch.empty(1)
            cond = Conditioning(torch.empty(1, dtype=torch.int64))
            if text is not None:
                states = torch.empty(1, text.tokens, text.width)
                pooled = torch.empty(1, text.pooled_width)
                cond = Conditioning(cond.labels, states, pooled, torch.empty(1, 6))
        flops = count_flops(lambda model=model, z_t=z_t, t=t, cond=cond: model(z_t, t, cond))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"| {name} | {side}x{side}x{channels} | {parameters / 1e6:,.1f} | {flops / 2e9:,.2f} |"
        )


if __name__ == "__main__":
    main()
