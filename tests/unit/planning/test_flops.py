"""FLOPs against closed forms, forward and backward, on meta tensors."""

import pytest
import torch
from torch import nn

from lpl_pretrain.planning.flops import count_flops


def backward(module, x):
    y = module(x)
    return count_flops(lambda: y.backward(torch.empty_like(y)))


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_and_convolution(frozen):
    x = torch.empty(2, 6, 8, 8, device="meta", requires_grad=True)
    convolution = nn.Conv2d(6, 5, 3, padding=1, device="meta").requires_grad_(not frozen)
    forward = 2 * 2 * 8 * 8 * 5 * 6 * 9
    assert count_flops(lambda: convolution(x)) == forward
    assert backward(convolution, x) == forward * (1 if frozen else 2), (
        "frozen weights cost the input gradient only"
    )
    tokens = torch.empty(3, 7, device="meta", requires_grad=True)
    linear = nn.Linear(7, 4, device="meta").requires_grad_(not frozen)
    assert count_flops(lambda: linear(tokens)) == 2 * 3 * 7 * 4
    assert backward(linear, tokens) == 2 * 3 * 7 * 4 * (1 if frozen else 2)


@pytest.mark.parametrize("frozen", [False, True])
def test_merged_upsampling(frozen):
    """The transposed convolution that models/upsampling.py makes: every input meets the whole 4x4
    kernel.
    """
    x = torch.empty(2, 6, 8, 8, device="meta", requires_grad=True)
    transposed = nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1, device="meta").requires_grad_(
        not frozen
    )
    forward = 2 * 2 * 8 * 8 * 6 * 5 * 16
    assert count_flops(lambda: transposed(x)) == forward
    assert backward(transposed, x) == forward * (1 if frozen else 2)


@pytest.mark.parametrize("device, products", [("meta", 4), ("cpu", 5)])
def test_attention(device, products):
    """Two matrix products forward; four backward, and a fused kernel makes the scores again."""
    q = torch.zeros(2, 4, 10, 16, device=device, requires_grad=True)
    product = 2 * 2 * 4 * 10 * 10 * 16
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * product
    assert (
        backward(lambda x: nn.functional.scaled_dot_product_attention(x, x, x), q)
        == products * product
    )


def test_batched_products():
    a, b = torch.empty(3, 4, 5, device="meta"), torch.empty(3, 5, 6, device="meta")
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5 * 6


def test_has_teeth_elementwise_work_is_not_counted():
    assert count_flops(lambda: torch.empty(100, device="meta").exp() + 1) == 0
