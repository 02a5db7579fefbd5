"""LPL as one would write it to be sure: float64, one autograd graph, sorting, loops, no chunks, no
shared work.
"""

import math

import torch

STAGES = ["mid", "up0", "up1", "up2", "up3"]


def reference_keep(maps, outliers, stage):
    keep = torch.zeros_like(maps)
    n = maps[0, 0].numel()
    for b in range(len(maps)):
        for c in range(maps.shape[1]):
            values = sorted(maps[b, c].flatten().tolist())
            q1, q2 = (values[max(1, int(q * n)) - 1] for q in outliers.quantiles)
            mean = sum(values) / n
            reach = outliers.margin * math.sqrt(
                sum((v - mean) ** 2 for v in values) / max(1, n - 1)
            )
            keep[b, c] = ((maps[b, c] > q1 - reach) & (maps[b, c] < q2 + reach)).to(keep.dtype)
    for size, pick in zip(outliers.kernels[min(stage, len(outliers.kernels) - 1)], (max, min)):
        r, old = size // 2, keep.clone()
        for y in range(keep.shape[2]):
            for x in range(keep.shape[3]):
                window = old[:, :, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
                keep[:, :, y, x] = (
                    window.amax(dim=(2, 3)) if pick is max else window.amin(dim=(2, 3))
                )
    return keep


def statistics(x, normalize, gated):
    """(shift, divisor) that broadcast against x."""
    dims = {"space": (2, 3), "channels": (1,), "batch": (0, 2, 3)}[normalize.over]
    seen = x[gated] if normalize.over == "batch" else x
    if normalize.kind == "l2_norm":
        return 0.0, seen.square().sum(dims, keepdim=True).sqrt()
    mean = seen.mean(dims, keepdim=True)
    return mean, (seen - mean).square().mean(dims, keepdim=True).sqrt()


def normalized(config, clean, predicted, keep, gated):
    normalize = config.normalize
    if normalize is None:
        return clean, predicted
    zeroed = config.outliers is not None and config.outliers.zeroed_in_statistics
    seen_clean = clean * keep if zeroed and config.outliers.source == "target" else clean
    seen_predicted = (
        predicted * keep if zeroed and config.outliers.source == "prediction" else predicted
    )
    of_clean = statistics(seen_clean, normalize, gated)
    of_predicted = statistics(
        seen_predicted if normalize.gradient else seen_predicted.detach(), normalize, gated
    )
    by_clean = of_predicted if normalize.source == "prediction" else of_clean
    by_predicted = of_clean if normalize.source == "target" else of_predicted
    return (clean - by_clean[0]) / by_clean[1], (predicted - by_predicted[0]) / by_predicted[1]


def reference_loss(config, clean, predicted, weights, latent_side):
    """{stage: features} of both branches -> (K,) weighted loss; differentiable at the predicted
    ones.
    """
    total = torch.zeros(len(weights), dtype=torch.float64)
    for position, name in enumerate(clean):
        f, f_hat = clean[name], predicted[name]
        stage = STAGES.index(name)
        keep = torch.ones_like(f)
        if config.outliers is not None and stage >= config.outliers.first_stage:
            source = f if config.outliers.source == "target" else f_hat.detach()
            keep = reference_keep(source, config.outliers, stage)
        f, f_hat = normalized(config, f, f_hat, keep, weights > 0)
        if config.depth_weights == "inverse_resolution":
            omega = latent_side / f.shape[-1]
        else:
            omega = 1.0 if config.depth_weights == "uniform" else config.depth_weights[position]
        for b in range(len(f)):
            channels = []
            for c in range(f.shape[1]):
                error = keep[b, c] * (f[b, c] - f_hat[b, c])
                error = error.abs() if config.distance == "l1" else error**2
                count = error.numel()
                if config.outliers is not None and config.outliers.mean_over == "kept":
                    count = max(1, int(keep[b, c].sum()))
                channels.append(error.sum() / count)
            total[b] = total[b] + omega * sum(channels) / len(channels) / len(clean)
    return total * weights
