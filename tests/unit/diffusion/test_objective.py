"""A denoiser that knows the output has zero loss and returns the clean latent, for every
prediction.
"""

import pytest
import torch

from lpl_pretrain.config.diffusion import WeightingConfig
from lpl_pretrain.config.schema import Prediction, ScheduleKind
from lpl_pretrain.diffusion.denoiser import DenoiserOutput
from lpl_pretrain.diffusion.objective import denoise
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.diffusion.weighting import loss_weight

PAIRS = [
    (Prediction.EPS, ScheduleKind.SCALED_LINEAR),
    (Prediction.V, ScheduleKind.COSINE),
    (Prediction.FLOW, ScheduleKind.RECTIFIED_FLOW),
]


def predicting(output):
    """A denoiser with this output for every input."""
    return lambda z_t, t, cond, hidden_blocks: DenoiserOutput(output, {})


def setting(kind, schedule_kind):
    torch.manual_seed(0)
    schedule = make_schedule(schedule_kind)
    z0, eps = torch.randn(2, 6, 4, 5, 5, dtype=torch.float64)
    t = schedule.snap(torch.tensor([0.01, 0.2, 0.4, 0.6, 0.8, 0.95], dtype=torch.float64))
    alpha_t, sigma_t = schedule.coefficients(t)
    a, s = alpha_t.view(-1, 1, 1, 1), sigma_t.view(-1, 1, 1, 1)
    output = {Prediction.EPS: eps, Prediction.V: a * eps - s * z0, Prediction.FLOW: eps - z0}[kind]
    return schedule, z0, eps, t, alpha_t, sigma_t, output


@pytest.mark.parametrize("kind, schedule_kind", PAIRS)
def test_the_right_answer(kind, schedule_kind):
    _, z0, eps, t, alpha_t, sigma_t, output = setting(kind, schedule_kind)
    denoised = denoise(predicting(output), kind, z0, eps, t, alpha_t, sigma_t, None)
    assert not denoised.mse.any()
    torch.testing.assert_close(denoised.z0_hat, z0)
    torch.testing.assert_close(denoised.noise_level, sigma_t / alpha_t)


@pytest.mark.parametrize("kind, schedule_kind", PAIRS)
def test_the_model_sees_z_t_and_t(kind, schedule_kind):
    _, z0, eps, t, alpha_t, sigma_t, output = setting(kind, schedule_kind)
    calls = []
    denoise(
        lambda *arguments: calls.append(arguments) or DenoiserOutput(output, {}),
        kind,
        z0,
        eps,
        t,
        alpha_t,
        sigma_t,
        "cond",
    )
    z_t, time, cond, hidden_blocks = calls[0]
    torch.testing.assert_close(z_t[2], alpha_t[2] * z0[2] + sigma_t[2] * eps[2])
    assert time is t and cond == "cond" and hidden_blocks == ()


@pytest.mark.parametrize("kind, schedule_kind", PAIRS)
@pytest.mark.parametrize("other_kind", list(Prediction))
def test_has_teeth(kind, schedule_kind, other_kind):
    """The right output to one question is a wrong output to the others."""
    if other_kind is kind:
        return
    _, z0, eps, t, alpha_t, sigma_t, output = setting(kind, schedule_kind)
    denoised = denoise(predicting(output), other_kind, z0, eps, t, alpha_t, sigma_t, None)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(denoised.z0_hat, z0, rtol=0.1, atol=0.1)


ON_Z0 = {  # in the papers' own form
    "min_snr": ({"gamma": 3.0}, lambda snr: snr.clamp(max=3.0)),
    "soft_min_snr": ({"gamma": 3.0}, lambda snr: 3.0 * snr / (snr + 3.0)),
    "p2": ({"k": 2.0, "power": 0.5}, lambda snr: snr / (2.0 + snr).sqrt()),
    "sigmoid": ({"bias": -1.0}, lambda snr: snr / (1 + torch.e * snr)),
}


@pytest.mark.parametrize("kind, schedule_kind", PAIRS)
@pytest.mark.parametrize("weighting", ON_Z0)
def test_a_weighting_is_one_weight_on_the_error_of_z0(kind, schedule_kind, weighting):
    """Weight x squared error of the prediction = the paper's weight x squared error of z0, for
    every prediction.
    """
    options, on_z0 = ON_Z0[weighting]
    _, z0, eps, t, alpha_t, sigma_t, output = setting(kind, schedule_kind)
    wrong = output + 0.1 * torch.randn_like(output)
    denoised = denoise(predicting(wrong), kind, z0, eps, t, alpha_t, sigma_t, None)
    got = (
        loss_weight(WeightingConfig(kind=weighting, **options), kind, denoised.noise_level)
        * denoised.mse
    )
    error = (denoised.z0_hat - z0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(got, on_z0((alpha_t / sigma_t).square()) * error)


@pytest.mark.parametrize("kind", list(Prediction))
@pytest.mark.parametrize("weighting", ON_Z0)
def test_weights_are_finite_from_no_noise_to_noise_alone(kind, weighting):
    weights = loss_weight(
        WeightingConfig(kind=weighting), kind, torch.tensor([0.0, 1e-6, 1.0, 1e6])
    )
    assert weights.isfinite().all() and (weights >= 0).all()


def test_v_at_zero_terminal_snr():
    """The last timestep is noise alone: the output is -z0, and so is the estimate's source."""
    schedule = make_schedule(ScheduleKind.SCALED_LINEAR, zero_terminal_snr=True)
    t = torch.tensor([0.999], dtype=torch.float64)
    alpha_t, sigma_t = schedule.coefficients(t)
    z0, eps = torch.randn(2, 1, 4, 5, 5, dtype=torch.float64)
    assert alpha_t.item() == 0.0
    denoised = denoise(predicting(-z0), Prediction.V, z0, eps, t, alpha_t, sigma_t, None)
    torch.testing.assert_close(denoised.z0_hat, z0)
    assert (
        not denoised.mse.any()
        and loss_weight(WeightingConfig(kind="min_snr"), Prediction.V, denoised.noise_level)
        .isfinite()
        .all()
    )
