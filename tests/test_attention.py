"""Step 4: the equation and the fused kernel are one function, and equal transformers' eager one."""

import pytest
import torch
from parity import Pair
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from minigpt.attention import Attention, Conv1D, attend, attend_fused
from minigpt.config import GPTConfig
from minigpt.mask import visible


def random_qkv(T: int, S: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(T * 100 + S)
    shapes = [(2, 3, T, 8), (2, 3, S, 8), (2, 3, S, 8)]
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator) * 3 for s in shapes)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (6, 6), (1, 9), (4, 9)])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_kernel_computes_the_equation(T: int, S: int, window: int | None) -> None:
    q, k, v = random_qkv(T, S)
    mask = None if window is None else visible(T, S, window)
    torch.testing.assert_close(attend(q, k, v, mask), attend_fused(q, k, v, mask))


def test_the_equation_is_transformers_eager_attention(pair: Pair) -> None:
    q, k, v = random_qkv(5, 5)
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~visible(5, 5), -torch.inf)
    module = pair.theirs.transformer.h[0].attn
    theirs, _ = eager_attention_forward(module, q, k, v, mask, scaling=8**-0.5, dropout=0.0)
    torch.testing.assert_close(attend(q, k, v).transpose(1, 2), theirs)


def test_a_token_does_not_depend_on_those_after_it() -> None:
    q, k, v = random_qkv(6, 6)
    before = attend(q, k, v)
    k[:, :, 4:], v[:, :, 4:] = 9.0, 9.0
    assert torch.equal(attend(q, k, v)[:, :, :4], before[:, :, :4])


def test_heads_are_split_and_merged_without_loss() -> None:
    layer = Attention(GPTConfig(n_embd=12, n_head=3), 0)
    x = torch.arange(24.0).view(1, 2, 12)
    assert layer.split(x).shape == (1, 3, 2, 4)
    assert torch.equal(layer.merge(layer.split(x)), x)


def test_conv1d_is_a_linear_layer_with_its_weight_transposed() -> None:
    layer = Conv1D(4, 6)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4)
    linear = torch.nn.functional.linear(x, layer.weight.T, layer.bias)
    torch.testing.assert_close(layer(x), linear)


def test_dropout_acts_in_training_only() -> None:
    layer = Attention(GPTConfig(n_embd=8, n_head=2, attn_pdrop=0.5, resid_pdrop=0.0), 0)
    torch.nn.init.normal_(layer.c_attn.weight)
    torch.nn.init.normal_(layer.c_proj.weight)
    x = torch.randn(1, 5, 8)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
