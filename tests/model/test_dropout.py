"""Dropout: its chances, its scale, its gradient, and attention with it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from formary.model.attention import attend
from formary.model.dropout import Dropout, dropout


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_as_many_numbers_are_left_out_as_was_asked_and_the_mean_stays(share):
    torch.manual_seed(0)
    dropped = dropout(torch.ones(400_001), share)
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=0.004)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_neighbours_are_left_out_independently():
    torch.manual_seed(0)
    out = (dropout(torch.ones(400_000), 0.3) == 0).float().view(-1, 4)  # the four of one draw
    both = (out.T @ out) / len(out)
    expected = torch.full((4, 4), 0.09) + torch.diag(torch.full((4,), 0.21))
    torch.testing.assert_close(both, expected, atol=0.004, rtol=0)


@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_what_is_kept_is_scaled_and_gets_its_gradient(rows, columns, dtype):
    vectors = torch.rand(rows, columns, dtype=torch.float64).add(0.5).to(dtype).requires_grad_()
    dropped = dropout(vectors, 0.5)
    dropped.sum().backward()
    kept = dropped != 0
    assert dropped.dtype == dtype and torch.equal(dropped[kept], 2 * vectors.detach()[kept])
    assert torch.equal(vectors.grad, 2 * kept.to(dtype))


def test_the_seed_decides_what_is_left_out():
    def draw(seed):
        torch.manual_seed(seed)
        return dropout(torch.ones(64), 0.5)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_nothing_is_left_out_after_training():
    layer, vectors = Dropout(0.5), torch.ones(100)
    assert layer(vectors).eq(0).any()
    assert layer.eval()(vectors) is vectors


@pytest.mark.parametrize("kind", ["nothing", "padding", "bias", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_written_out_equals_torchs(kind, kv_heads):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 5, 8), torch.randn(2, kv_heads, 5, 8)
    mask = {"padding": torch.tensor([5, 3])[:, None] > torch.arange(5), "bias": torch.randn(2, 4, 5, 5)}.get(kind)
    mask = mask[:, None, None, :] if kind == "padding" else mask
    ours = attend(queries, keys, values, mask=mask, causal=kind == "causal", scale=None, dropped=0.0)
    theirs = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=kind == "causal", enable_gqa=kv_heads != 4
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
