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
    assert backward(convolution, x) == forward * (1 if frozen else 2), "frozen weights cost the input gradient only"
    tokens = torch.empty(3, 7, device="meta", requires_grad=True)
    linear = nn.Linear(7, 4, device="meta").requires_grad_(not frozen)
    assert count_flops(lambda: linear(tokens)) == 2 * 3 * 7 * 4
    assert backward(linear, tokens) == 2 * 3 * 7 * 4 * (1 if frozen else 2)


def test_attention():
    q = torch.empty(2, 4, 10, 16, device="meta")
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 4 * 10 * 10 * 16)


def test_has_teeth_elementwise_work_is_not_counted():
    assert count_flops(lambda: torch.empty(100, device="meta").exp() + 1) == 0
