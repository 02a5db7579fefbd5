"""Train a small denoiser with LPL in a plain PyTorch loop, with any diffusers autoencoder:

python examples/lpl_in_your_own_loop.py [FOLDER OF AN AUTOENCODER]
"""

import sys

import torch
from diffusers import AutoModel
from torch import nn

from lpl_pretrain import lpl_from_autoencoder, resolve_path

torch.manual_seed(0)
folder = sys.argv[1] if len(sys.argv) > 1 else str(resolve_path("asset:autoencoder_emoji"))
autoencoder = AutoModel.from_pretrained(folder).eval()
shift = autoencoder.config.shift_factor or 0.0
scale = autoencoder.config.scaling_factor
lpl = lpl_from_autoencoder(autoencoder, stages=["mid", "up0", "up1"])

images = torch.rand(8, 3, 64, 64) * 2 - 1  # your images, in [-1, 1]
with torch.no_grad():
    z0 = (autoencoder.encode(images).latent_dist.mean - shift) * scale
channels = z0.shape[1]  # your denoiser reads t and conditions too
denoiser = nn.Sequential(
    nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, channels, 3, padding=1)
)
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)

for step in range(10):
    t, eps = torch.rand(len(z0), 1, 1, 1), torch.randn_like(z0)
    z_t = (1 - t) * z0 + t * eps
    u = denoiser(z_t)  # estimate of the velocity eps - z0
    gate = ((1 - t) ** 2 / t**2 >= 3).flatten().float()  # only where the SNR is at least 3
    features = lpl(z0, z_t - t * u, gate)  # z_t - t * u is the one-step estimate of z0
    loss = (u - (eps - z0)).square().mean() + 3.0 * features.loss.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}, LPL {features.loss.mean().item():.4f}")
