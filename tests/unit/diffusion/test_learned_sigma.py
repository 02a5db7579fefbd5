"""The variational bound against torch's own divergence of normals, and its gradient against where
it may not go.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lpl_pretrain.config.schema import Prediction, ScheduleKind
from lpl_pretrain.diffusion.denoiser import DenoiserOutput
from lpl_pretrain.diffusion.learned_sigma import variational_bound
from lpl_pretrain.diffusion.objective import denoise
from lpl_pretrain.diffusion.schedule import make_schedule

SCHEDULE = make_schedule(ScheduleKind.LINEAR)


def denoised_at(t, logits, prediction=Prediction.EPS, wrong=0.1):
    torch.manual_seed(0)
    z0, eps, error = torch.randn(3, len(t), 2, 3, 3, dtype=torch.float64)
    alpha_t, sigma_t = SCHEDULE.coefficients(t)
    a, s = alpha_t.view(-1, 1, 1, 1), sigma_t.view(-1, 1, 1, 1)
    output = {Prediction.EPS: eps, Prediction.V: a * eps - s * z0}[prediction] + wrong * error
    output.requires_grad_()
    denoised = denoise(
        lambda *_: DenoiserOutput(torch.cat([output, logits], dim=1), {}),
        prediction,
        z0,
        eps,
        t,
        alpha_t,
        sigma_t,
        None,
    )
    return denoised, a * z0 + s * eps, output


def slow_bound(time, logits, z0, z0_hat, z_t):
    """Bound of one sample by the posterior's own formulas (arXiv 2006.11239, equations 6 and 7)."""
    n = round(time * 1000)
    beta, now, before = (
        SCHEDULE.betas[n],
        SCHEDULE.alphas_cumprod[n],
        SCHEDULE.alphas_cumprod[n - 1],
    )
    tilde = beta * (1 - before) / (1 - now)

    def mean(z0):
        return (
            before.sqrt() * beta / (1 - now) * z0
            + (1 - beta).sqrt() * (1 - before) / (1 - now) * z_t
        )

    fraction = (logits + 1) / 2
    std = (fraction * beta.log() + (1 - fraction) * tilde.log()).exp().sqrt()
    return kl_divergence(
        Normal(mean(z0), tilde.sqrt()), Normal(mean(z0_hat), std)
    ).mean() / math.log(2)


@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.V])
def test_equals_the_divergence_of_two_normals(prediction):
    t = torch.tensor([0.001, 0.1, 0.5, 0.999], dtype=torch.float64)
    denoised, z_t, _ = denoised_at(
        t, torch.rand(4, 2, 3, 3, dtype=torch.float64) * 2 - 1, prediction
    )
    slow = [
        slow_bound(*row)
        for row in zip(t.tolist(), denoised.variance_logits, denoised.z0, denoised.z0_hat, z_t)
    ]
    torch.testing.assert_close(
        variational_bound(SCHEDULE, t, denoised), torch.stack(slow), rtol=1e-6, atol=1e-9
    )


def test_the_mean_gets_no_gradient_from_it():
    t, logits = (
        torch.tensor([0.3], dtype=torch.float64),
        torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True),
    )
    denoised, _, output = denoised_at(t, logits)
    variational_bound(SCHEDULE, t, denoised).sum().backward()
    assert output.grad is None or not output.grad.any()
    assert logits.grad.abs().min() > 0


def test_the_right_mean_and_the_least_variance_cost_nothing():
    t = torch.tensor([0.0, 0.2, 0.8], dtype=torch.float64)
    denoised, _, _ = denoised_at(t, -torch.ones(3, 2, 3, 3, dtype=torch.float64), wrong=0.0)
    torch.testing.assert_close(
        variational_bound(SCHEDULE, t, denoised), torch.zeros(3, dtype=torch.float64)
    )
    assert not denoised.mse.any()
