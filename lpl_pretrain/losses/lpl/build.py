"""LPL of a run, built from its configuration."""

from __future__ import annotations

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.losses.lpl.features import DTYPES, DecoderFeatures
from lpl_pretrain.losses.lpl.flops import lpl_flops
from lpl_pretrain.losses.lpl.gate import gate_fraction, max_noise_level
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.losses.lpl.term import LPLTerm, PanelSource
from lpl_pretrain.losses.lpl.weight import LPLWeight
from lpl_pretrain.losses.term import TermContext
from lpl_pretrain.models.autoencoder import (
    LatentScaling,
    compose_scaling,
    decoder_stages,
    load_autoencoder,
)


def build_lpl(context: TermContext) -> LPLTerm | None:
    """Build LPL; None without an `lpl` section.  The decoder keeps only the compared stages."""
    config = context.config
    lpl = config.lpl
    if lpl is None:
        return None
    threshold = max_noise_level(lpl.gate, context.schedule)
    fraction = gate_fraction(threshold, context.schedule, config.diffusion.timesteps)
    features = build_features(config, lpl, context.index, context.scaling)
    flops_per_sample = lpl_flops(lpl, features, context.index)
    if lpl.compile:
        features.compile_layers(len(context.index.buckets))
    features.to(context.device)
    for bucket in context.index.buckets:
        features.check(context.index.latent.channels, bucket.height, bucket.width)
    return LPLTerm(
        LatentPerceptualLoss(lpl, features, context.sum_over_ranks),
        LPLWeight(lpl),
        LPLSubset.of(config.batch.global_batch_size, fraction, lpl.sample_fraction),
        max_noise_level=threshold,
        prediction=config.diffusion.prediction,
        num_microbatches=context.num_microbatches,
        microbatches_per_rank=context.microbatches_per_rank,
        flops_per_sample=flops_per_sample,
        panel_source=PanelSource(config.autoencoder, context.scaling),
        mean_over_ranks=context.mean_over_ranks,
    )


def build_features(
    config: TrainConfig, lpl: LPLConfig, index: DatasetIndex, scaling: LatentScaling
) -> DecoderFeatures:
    """Decoder features of `lpl.decoder`, or of the autoencoder itself; not compiled."""
    autoencoder = load_autoencoder(lpl.decoder or config.autoencoder)
    if lpl.decoder is not None:
        scaling = compose_scaling(scaling, index.autoencoder, autoencoder)
    stages = decoder_stages(autoencoder.network)
    return DecoderFeatures(stages, scaling, lpl.stages, dtype=DTYPES[lpl.decoder_precision])
