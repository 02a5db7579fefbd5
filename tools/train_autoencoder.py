"""Train the small autoencoder in `lpl_pretrain/assets/autoencoder_emoji/`.

    python tools/train_autoencoder.py --minutes 50
    python tools/train_autoencoder.py --start FOLDER --minutes 6 --whole-from 0 --lr 6e-4 \
        --kl 0.25 --ema 0.99
    python tools/train_autoencoder.py --measure     # held-out PSNR of the shipped folder

It is a `diffusers.AutoencoderKL` with factor 4 and 4 channels.  The second command continues with a
strong KL term: noisy posteriors make the decoder robust against the errors of a small denoiser.
quality.json lists the commands that made the shipped weights.

Loss: L1 + `--perceptual` x distance of EfficientNet-Lite0 features + `--kl` x KL(posterior || N(0,
1)) per pixel value.  Only train images are used.  Weights are an exponential moving average.  Most
of the time goes to random 32-px crops (4x cheaper than 64 px), the end to whole images, because
GroupNorm statistics depend on the field of view.  `scaling_factor` is 1 / std of the train latents,
as diffusers pipelines expect.
"""

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import webdataset
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from lpl_pretrain.evaluation.timm_networks import efficientnet_lite0_weights

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "lpl_pretrain" / "assets" / "emoji"
OUTPUT = ROOT / "lpl_pretrain" / "assets" / "autoencoder_emoji"
CROP_PX = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=45.0, help="wall time of the training loop"
    )
    parser.add_argument(
        "--whole-from",
        type=float,
        default=0.6,
        help="fraction of the time after which whole images are used",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=48,
        help="crops per step; a quarter as many whole images",
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--perceptual", type=float, default=0.02)
    parser.add_argument("--kl", type=float, default=1e-6)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--start", type=Path, help="start from the weights in this folder")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing; print the PSNR of --output"
    )
    args = parser.parse_args()
    if args.measure:
        print(
            json.dumps(
                measure(AutoencoderKL.from_pretrained(args.output), read_images("held_out")),
                indent=2,
            )
        )
        return
    torch.manual_seed(0)
    model = train(read_images("train"), args)
    quality = {
        **measure(model, read_images("held_out")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": [
            *(
                json.loads((args.start / "quality.json").read_text())["trained"]
                if args.start
                else []
            ),
            " ".join(sys.argv),
        ],
    }
    model.half().save_pretrained(args.output)
    (args.output / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))


def read_images(split: str) -> torch.Tensor:
    """All images of a split: (N, 3, 64, 64) in [-1, 1]."""
    samples = webdataset.WebDataset(
        str(EMOJI / f"{split}.tar"), shardshuffle=False, empty_check=False
    )
    pixels = [np.asarray(Image.open(io.BytesIO(s["png"]))) for s in samples]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=64,
    )


def train(images: torch.Tensor, args: argparse.Namespace) -> AutoencoderKL:
    model = (
        AutoencoderKL.from_pretrained(args.start, torch_dtype=torch.float32)
        if args.start
        else new_autoencoder()
    )
    model, average = model.to(memory_format=torch.channels_last), new_autoencoder()
    average.load_state_dict(model.state_dict())
    perceptual = PerceptualDistance()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    started = time.monotonic()
    done = 0.0
    step = 0
    with tqdm(
        total=100,
        unit="%",
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        mininterval=5,
    ) as bar:
        while done < 1.0:
            whole = done > args.whole_from
            x0 = draw(images, args.batch // 4 if whole else args.batch, None if whole else CROP_PX)
            for group in optimizer.param_groups:
                group["lr"] = (
                    args.lr * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
                )
            with torch.autocast("cpu", torch.bfloat16):
                posterior = model.encode(x0).latent_dist
                x0_hat = model.decode(posterior.sample()).sample.float()
            l1, features, kl = (
                (x0_hat - x0).abs().mean(),
                perceptual(x0_hat, x0),
                posterior.kl().mean() / x0[0].numel(),
            )
            loss = l1 + args.perceptual * features + args.kl * kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                keep = min(args.ema, step / (step + 10))
                for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(new, 1 - keep)
            done = (time.monotonic() - started) / (60 * args.minutes)
            bar.update(min(100.0, 100 * done) - bar.n)
            if step % 250 == 0:
                bar.set_postfix(
                    step=step, l1=f"{l1:.4f}", features=f"{features:.3f}", kl=f"{kl:.1f}"
                )
            if step % 500 == 0:
                tqdm.write(f"step {step}  held-out {measure(average, read_images('held_out'))}")
    with torch.no_grad():
        latents = torch.cat([average.encode(x).latent_dist.mode() for x in images.split(64)])
    average.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return average.eval()


def draw(images: torch.Tensor, count: int, crop_px: int | None) -> torch.Tensor:
    """Draw a random batch; each image is mirrored with probability 1/2."""
    batch = images[torch.randint(len(images), (count,))]
    if crop_px:
        top, left = torch.randint(images.shape[2] - crop_px + 1, (2, count)).tolist()
        batch = torch.stack(
            [
                x[:, i : i + crop_px, j : j + crop_px]
                for x, i, j in zip(batch, top, left, strict=True)
            ]
        )
    mirrored = torch.rand(count, 1, 1, 1) < 0.5
    return torch.where(mirrored, batch.flip(3), batch).contiguous(memory_format=torch.channels_last)


class PerceptualDistance:
    """Mean squared distance of unit-normalised EfficientNet-Lite0 features.

    This is LPIPS (arXiv 1801.03924) without learned weights.
    """

    def __init__(self) -> None:
        self.network = timm.create_model(
            "tf_efficientnet_lite0", features_only=True, out_indices=(0, 1, 2)
        )
        self.network.load_state_dict(efficientnet_lite0_weights(), strict=False)
        self.network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def __call__(self, x0_hat: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            pairs = self.network(torch.cat([x0_hat, x0]))
        distance = torch.zeros(())
        for both in pairs:
            predicted, clean = F.normalize(both.float(), dim=1).chunk(2)
            distance = distance + (predicted - clean).square().sum(dim=1).mean()
        return distance


@torch.no_grad()
def measure(model: AutoencoderKL, images: torch.Tensor) -> dict:
    """PSNR in dB of reconstructions from the posterior mean, rounded to uint8.

    It is computed for each image over [0, 255] and then averaged.
    """
    model.eval()
    values = []
    for x0 in images.split(64):
        x0_hat = model.decode(model.encode(x0).latent_dist.mode()).sample
        to_uint8 = [((x.clamp(-1, 1) + 1) * 127.5).round() for x in (x0, x0_hat)]
        mse = (to_uint8[0] - to_uint8[1]).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        values.append(10 * torch.log10(255.0**2 / mse))
    model.train()
    psnr = torch.cat(values)
    return {
        "held_out_psnr_db": round(psnr.mean().item(), 3),
        "median_db": round(psnr.median().item(), 3),
        "pictures": len(psnr),
    }


if __name__ == "__main__":
    main()
