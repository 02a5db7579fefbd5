"""Images, latents, configurations and one uninterrupted run of 8 steps, shared by all tests."""

from __future__ import annotations

import pytest

from tests.support.autoencoders import tiny_folder
from tests.support.commands import lpl
from tests.support.latents import draw_images

TRAIN = """
name: tiny
steps: 8
autoencoder: {autoencoder}
data: {{folder: {latents}}}
model: {{width: 32, depth: 2, heads: 2}}
diffusion: {{prediction: flow, schedule: rectified_flow, timesteps: {{distribution: logit_normal}}}}
lpl: {{target_fraction: 0.2, gate: {{noise_level_below: 1.0}}, start_step: 1, calibration_steps: 3}}
optimizer: {{lr: 1.0e-3}}
batch: {{global_batch_size: 8}}
checkpoint: {{every_steps: 4}}
log: {{every_steps: 1, sample_indices: true}}
ema: {{sigma_rel: [0.05, 0.1], snapshot_every_steps: 2}}
"""
PROTOCOL = """
name: quick
images: 12
batch_size: 6
sampler: {{kind: euler, steps: 3}}
guidance_scales: [1.0, 2.0]
reference: {images}
grid_images: 4
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with images/, latents/, train.yaml, quick.yaml and the finished run whole/."""
    folder = tmp_path_factory.mktemp("cli")
    draw_images(folder / "images")
    autoencoder = tiny_folder(folder / "autoencoder")
    encode = folder / "encode.yaml"
    encode.write_text(
        f"source: {folder}/images\noutput: {folder}/latents\nautoencoder: "
        f"{autoencoder}\nresolution_px: 32\nshard_samples: 9\n"
    )
    # two processes that do not communicate
    output = lpl("encode", encode, ranks=2, cold=True).stdout
    assert "32 samples" in output and "4 shards" in output
    (folder / "train.yaml").write_text(
        TRAIN.format(autoencoder=autoencoder, latents=folder / "latents")
    )
    (folder / "quick.yaml").write_text(PROTOCOL.format(images=folder / "images"))
    lpl("train", folder / "train.yaml", f"run_dir={folder}/whole", cold=True)
    return folder
