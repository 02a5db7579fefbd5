"""Pretraining of latent diffusion models with the Latent Perceptual Loss."""

__version__ = "0.1.0"
