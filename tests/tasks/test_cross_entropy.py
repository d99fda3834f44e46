"""The chunked cross-entropy against torch's own: loss and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.model.topologies import build
from formary.recipe.presets import preset
from formary.tasks import cross_entropy as module
from formary.tasks.cross_entropy import IGNORED, cross_entropy, token_losses


@pytest.mark.parametrize("name", ["gpt-mini", "bert-mini", "bart-base"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 0.2])
def test_loss_and_gradients_equal_torchs(name, smoothing, cap, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 1)  # the smallest chunks: several per call
    head = build(preset(name, vocab_size=31, context=8, size="1x64", switches={"logit_cap": cap}), seed=0).head
    hidden = torch.randn(5, 40, 64, requires_grad=True)
    targets = torch.randint(0, 31, (5, 40))
    targets[0, :7] = IGNORED
    weights = [hidden, *head.parameters()]

    loss, count = cross_entropy(head, hidden, targets, smoothing=smoothing)
    ours = torch.autograd.grad(loss / count, weights)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    theirs = torch.autograd.grad(expected, weights)

    assert count == 193
    torch.testing.assert_close(loss / count, expected)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), vocab=st.integers(2, 50), seed=st.integers(0, 99), cap=st.sampled_from([None, 0.1]))
def test_token_losses_sum_to_the_loss(rows, vocab, seed, cap):
    torch.manual_seed(seed)
    head = build(preset("gpt-mini", vocab_size=vocab, context=8, size="1x32", switches={"logit_cap": cap}), seed=0).head
    hidden, targets = torch.randn(rows, 6, 32), torch.randint(0, vocab, (rows, 6))
    targets[torch.rand(rows, 6) < 0.3] = IGNORED
    losses = token_losses(head, hidden, targets)
    assert (losses[targets == IGNORED] == 0).all()
    torch.testing.assert_close(losses.sum(), cross_entropy(head, hidden, targets)[0].detach(), atol=1e-4, rtol=1e-4)


def test_nothing_to_predict_is_a_loss_of_zero_with_gradients_of_zero():
    head = build(preset("gpt-mini", vocab_size=11, context=8, size="1x32"), seed=0).head
    hidden = torch.randn(2, 3, 32, requires_grad=True)
    loss, count = cross_entropy(head, hidden, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss == 0 and count == 0 and (hidden.grad == 0).all()
