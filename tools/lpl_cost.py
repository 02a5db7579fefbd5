"""Cost of the Latent Perceptual Loss: FLOPs and memory of decoder stages and LPL options.

    python tools/lpl_cost.py configs/train/dit_xl2_in256_lpl.yaml --decoder sd --latent 4,32,32
    python tools/lpl_cost.py configs/train/emoji_dit_lpl.yaml lpl.sample_fraction=0.5
    python tools/lpl_cost.py --decoder flux --latent 32 --denoiser xl2

The configuration defaults to configs/train/dit_xl2_in256_lpl.yaml.  All counts come from meta
tensors, so no weights are loaded: the decoder is built from its config.json or from a named shape
(`--decoder`); the latents' shape comes from the data folder or from `--latent`.  FLOP = 2 x
multiply-add.  A training step of the denoiser counts as three forwards.  Bytes are the peak of one
chunk above the weights.

The first table is the decoder as `decode()` runs it; the second is LPL with merged upsampling
(models/upsampling.py).  Attention is counted as plain matrix products; a fused kernel does not
store the positions x positions matrix, which is the peak for large latents and few stages (`mid`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lpl_pretrain.config.dataset import LatentEntry, read_index
from lpl_pretrain.config.load import load_config, resolve_path
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.losses.lpl.features import DTYPES, DecoderFeatures
from lpl_pretrain.losses.lpl.gate import gate_fraction, max_noise_level
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.models.autoencoder import LatentScaling, decoder_stages
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.decoder import DecoderStages
from lpl_pretrain.planning.flops import count_flops
from lpl_pretrain.planning.live_bytes import LiveBytes
from lpl_pretrain.trainer.batch_plan import LPLSubset

SD: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "sd": SD,
    "flux": {**SD, "latent_channels": 16, "use_post_quant_conv": False, "use_quant_conv": False},
    "flux2": {**SD, "_class_name": "AutoencoderKLFlux2", "latent_channels": 32},
    "sana": {"_class_name": "AutoencoderDC"},
    "taesd": {"_class_name": "AutoencoderTiny"},
}
DENOISERS = {
    "s2": (384, 12, 6),
    "b2": (768, 12, 12),
    "l2": (1024, 24, 16),
    "xl2": (1152, 28, 16),
}
"""(width, depth, heads) of DiT sizes."""
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "train" / "dit_xl2_in256_lpl.yaml"
GIGA, MIB = 1e9, 2**20
TEXT = TextShape(tokens=154, width=4096, pooled_width=2048)
"""Text embeddings of SD3, for models that read text."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG KEY=VALUE", help=f"{CONFIG.name} without CONFIG"
    )
    parser.add_argument(
        "--decoder",
        help=f"a config.json, its folder, or one of {', '.join(SHAPES)}; else the configuration's",
    )
    parser.add_argument(
        "--latent",
        help="C,H,W, or one side with the decoder's channels; read from the data folder if absent",
    )
    parser.add_argument(
        "--denoiser", choices=DENOISERS, help="a DiT of this size; else the configuration's"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="number of microbatches x ranks of a step, which decode equally many samples",
    )
    parser.add_argument(
        "--samples",
        help="print a third table: peak memory for these numbers of gated samples, as 1,4,16",
    )
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_intermixed_args(arguments)
    config = read_config(args.words, args.denoiser)
    lpl = config.lpl or LPLConfig(target_fraction=0.2)
    network = build_network(args.decoder or lpl.decoder or config.autoencoder)
    channels, height, width = latent = latent_shape(
        args.latent, network.config.latent_channels, config
    )
    case = Case(config, lpl, latent, args.ranks)
    decoder = decoder_stages(network)
    stages = stage_rows(decoder, case)
    options = option_rows(decoder, case)
    print(
        f"{config.name}: latents {channels}x{height}x{width}, global batch "
        f"{config.batch.global_batch_size}, ",
        end="",
    )
    denoiser_gflops = case.denoiser_flops / GIGA
    print(
        f"{case.gated_fraction():.1%} inside the gate, denoiser {denoiser_gflops:,.2f} GFLOP a "
        "forward\n"
    )
    print(table(stages), "\n", table(options), sep="\n")
    result = {"stages": stages, "options": options}
    if args.samples:
        result["samples"] = sample_rows(
            decoder, case, [int(count) for count in args.samples.split(",")]
        )
        print("\n", table(result["samples"]), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


@dataclass(frozen=True)
class Case:
    """A configuration, the shape (C, H, W) of its latents, and the microbatches of a step."""

    config: TrainConfig
    lpl: LPLConfig
    latent: tuple[int, int, int]
    num_microbatches: int

    def gated_fraction(self) -> float:
        diffusion = self.config.diffusion
        schedule = make_schedule(diffusion.schedule, zero_terminal_snr=diffusion.zero_terminal_snr)
        return gate_fraction(
            max_noise_level(self.lpl.gate, schedule), schedule, self.config.diffusion.timesteps
        )

    def decoded_samples(self, lpl: LPLConfig) -> int:
        """Samples that all microbatches of one step decode, padding included."""
        subset = LPLSubset.of(
            self.config.batch.global_batch_size, self.gated_fraction(), lpl.sample_fraction
        )
        return subset.per_microbatch(self.num_microbatches) * self.num_microbatches

    @cached_property
    def denoiser_flops(self) -> int:
        """FLOPs of one sample's forward."""
        channels, height, width = self.latent
        entry = LatentEntry(
            channels=channels,
            height=height,
            width=width,
            mean=[0.0] * channels,
            std=[1.0] * channels,
        )
        with torch.device("meta"):
            model = build_denoiser(self.config.model, entry, num_classes=1000, text=TEXT)
        z_t, t, labels = (torch.empty(1, *shape, device="meta") for shape in (self.latent, (), ()))
        text, pooled = (
            torch.empty(1, *shape, device="meta")
            for shape in ((TEXT.tokens, TEXT.width), (TEXT.pooled_width,))
        )
        return count_flops(lambda: model(z_t, t, Conditioning(labels.long(), text, pooled)))


def read_config(words: Sequence[str], denoiser: str | None) -> TrainConfig:
    """Load `[CONFIG] [KEY=VALUE ...]`; overrides take precedence over the size `denoiser`."""
    has_path = bool(words) and "=" not in words[0]
    path = words[0] if has_path else CONFIG
    overrides = words[1:] if has_path else words
    size: dict[str, float | str] = {}
    if denoiser is not None:
        width, depth, heads = DENOISERS[denoiser]
        size = {
            "size": "null",
            "width": width,
            "depth": depth,
            "heads": heads,
            "patch_size": 2,
            "mlp_ratio": 4.0,
        }
    return load_config(
        TrainConfig, path, [*(f"model.{key}={value}" for key, value in size.items()), *overrides]
    )


def latent_shape(
    text: str | None, decoder_channels: int, config: TrainConfig
) -> tuple[int, int, int]:
    if text is None:
        entry = read_index(config.data.folder).latent
        channels, height, width = entry.channels, entry.height, entry.width
    else:
        *first, height, width = [
            int(number) for number in (text.split(",") if "," in text else [text, text])
        ]
        channels = first[0] if first else decoder_channels
    if channels != decoder_channels:
        raise ConfigError(
            f"latents of {channels} channels, but the decoder takes {decoder_channels}: change "
            "--latent or --decoder"
        )
    return channels, height, width


def build_network(name: str) -> Any:
    settings = SHAPES.get(name)
    if settings is None:
        path = resolve_path(name)
        path = path if path.suffix == ".json" else path / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"decoder {name}: {path} not found; give --decoder a folder, or one of "
                f"{', '.join(SHAPES)}"
            )
        settings = json.loads(path.read_text())
    with torch.device("meta"):
        return (
            getattr(diffusers, settings["_class_name"]).from_config(settings).requires_grad_(False)
        )


def stage_rows(decoder: DecoderStages, case: Case) -> list[dict[str, Any]]:
    """Rows of all parts of the decoder as `decode()` runs it, for one sample."""
    hidden = torch.empty(1, *case.latent, device="meta")
    rows = []
    for name, module in [
        ("conv_in", decoder.conv_in),
        *decoder.stages.items(),
        ("conv_out", decoder.conv_out),
    ]:
        leaf = hidden.detach().requires_grad_()
        outputs: list[torch.Tensor] = []
        forward = count_flops(
            lambda module=module, leaf=leaf, outputs=outputs: outputs.append(module(leaf))
        )
        hidden = outputs[0]
        backward = count_flops(
            lambda leaf=leaf, hidden=hidden: torch.autograd.grad(
                hidden, leaf, torch.empty_like(hidden)
            )
        )
        rows.append(
            {
                "stage": name,
                "channels": hidden.shape[1],
                "side": hidden.shape[-1],
                "forward GFLOP": forward / GIGA,
                "input gradient GFLOP": backward / GIGA,
                "parameters M": sum(p.numel() for p in module.parameters()) / 1e6,
            }
        )
    totals = {
        key: sum(row[key] for row in rows)
        for key in ("forward GFLOP", "input gradient GFLOP", "parameters M")
    }
    return [*rows, {"stage": "all", "channels": "", "side": "", **totals}]


def option_rows(decoder: DecoderStages, case: Case) -> list[dict[str, Any]]:
    step = 3 * case.denoiser_flops * case.config.batch.global_batch_size
    return [row(name, changed, lpl, case, step) for name, changed, lpl in variants(decoder, case)]


def variants(decoder: DecoderStages, case: Case) -> Iterator[tuple[str, DecoderStages, LPLConfig]]:
    """Yield (name, decoder, LPL configuration): as configured, then each option, then all."""

    def plus(**changes: Any) -> LPLConfig:
        return LPLConfig.model_validate({**case.lpl.model_dump(), **changes})

    every = list(decoder.stages)
    configured = [stage for stage in every if case.lpl.stages is None or stage in case.lpl.stages]
    channels, height, width = case.latent
    crop = {"side": min(height, width) // 2, "halo": 4}
    with torch.device("meta"):
        tiny = diffusers.AutoencoderTiny(
            latent_channels=channels, latent_magnitude=3
        ).requires_grad_(False)
    small = decoder_stages(tiny)
    half = 0.5 * case.lpl.sample_fraction
    yield "as configured", decoder, case.lpl
    flipped = not case.lpl.activation_checkpointing
    yield (
        f"activation_checkpointing: {str(flipped).lower()}",
        decoder,
        plus(activation_checkpointing=flipped),
    )
    for last in range(len(configured) - 1, 0, -1):
        yield f"stages up to {configured[last - 1]}", decoder, plus(stages=configured[:last])
    yield f"crop: {{side: {crop['side']}, halo: {crop['halo']}}}", decoder, plus(crop=crop)
    yield f"sample_fraction: {half:g}", decoder, plus(sample_fraction=half)
    early = configured[: max(1, len(configured) - 2)]
    yield (
        f"stages up to {early[-1]}, crop, share",
        decoder,
        plus(stages=early, crop=crop, sample_fraction=half),
    )
    yield "decoder: of TAESD's size", small, plus(stages=None, depth_weights="uniform")
    yield (
        "decoder: of TAESD's size, share",
        small,
        plus(stages=None, depth_weights="uniform", sample_fraction=half),
    )
    everything = plus(stages=None, depth_weights="uniform", crop=crop, sample_fraction=half)
    yield "decoder: of TAESD's size, crop, share", small, everything


def row(
    name: str, decoder: DecoderStages, lpl: LPLConfig, case: Case, denoiser_step: int
) -> dict[str, Any]:
    loss = build_loss(decoder, lpl, case)
    decoded = case.decoded_samples(lpl)
    chunk = min(lpl.chunk_size, decoded // case.num_microbatches)
    flops, peak = run_loss(loss, case, chunk)
    flops /= chunk
    return {
        "option": name,
        "GFLOP a sample": flops / GIGA,
        "samples a step": decoded,
        "of the denoiser's step": flops * decoded / denoiser_step,
        "chunk": chunk,
        "peak MiB": peak / MIB,
        "weights MiB": weight_bytes(loss) / MIB,
    }


def sample_rows(decoder: DecoderStages, case: Case, counts: list[int]) -> list[dict[str, Any]]:
    """Peak memory for each number of gated samples in a microbatch, decoded in chunks."""
    loss = build_loss(decoder, case.lpl, case)
    return [
        {"gated samples": str(count), "peak MiB": run_loss(loss, case, count)[1] / MIB}
        for count in counts
    ]


def build_loss(decoder: DecoderStages, lpl: LPLConfig, case: Case) -> LatentPerceptualLoss:
    scaling = LatentScaling(*torch.ones(2, case.latent[0], device="meta"))
    return LatentPerceptualLoss(
        lpl, DecoderFeatures(decoder, scaling, lpl.stages, dtype=DTYPES[lpl.decoder_precision])
    )


def run_loss(loss: LatentPerceptualLoss, case: Case, samples: int) -> tuple[float, int]:
    """(FLOPs, peak bytes above the weights) of LPL on `samples` gated samples."""
    z0, z0_hat = torch.empty(2, samples, *case.latent, device="meta")
    weights = torch.empty(samples, device="meta")
    crop_positions = torch.empty(samples, 2, device="meta")
    with LiveBytes() as live:
        flops = count_flops(lambda: loss(z0, z0_hat, weights, crop_positions))
    return flops, live.peak


def weight_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def table(rows: list[dict[str, Any]]) -> str:
    def text(key: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return (
            f"{value:.1%}"
            if key.startswith("of the")
            else f"{value:,.2f}"
            if value < 100
            else f"{value:,.0f}"
        )

    cells = [list(rows[0]), *([text(key, value) for key, value in row.items()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    aligned = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    ]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *rest])
        for line, (_, *rest) in zip(cells, aligned, strict=True)
    )


if __name__ == "__main__":
    main()
