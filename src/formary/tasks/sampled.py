"""Losses of a right choice against some wrong ones drawn at random, where a softmax over all of them would be too much."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_loss(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: str,
    draws: int,
    first: int,
    fixed: bool,
) -> tuple[Tensor, Tensor]:
    """The summed loss and its count, for hidden (count, width) and targets (count,), rows of weight (choices, width).

    Args:
        kind: sampled_softmax: one softmax over the right choice and `draws` that the whole batch shares (Jean et al. 2015,
            section 3, drawn evenly). bce: each choice by itself (Kang and McAuley 2018, section 3.5). bpr: the right one
            against each wrong one (Rendle et al. 2009, section 4.1). The latter two draw for every target.
        draws: how many are drawn; one that happens to be right does not count.
        first: the first row of weight that is a choice.
        fixed: draw the same every time, for validation.
    """
    generator = torch.Generator(hidden.device).manual_seed(0) if fixed else None
    shape = (draws,) if kind == "sampled_softmax" else (len(targets), draws)
    drawn = torch.randint(first, len(weight), shape, generator=generator, device=hidden.device)
    right = (hidden * weight[targets]).sum(dim=-1)
    wrong = hidden @ weight[drawn].T if drawn.dim() == 1 else (weight[drawn] @ hidden[..., None])[..., 0]
    if bias is not None:
        right, wrong = right + bias[targets], wrong + bias[drawn]
    right, wrong, same = right.float(), wrong.float(), drawn == targets[:, None]
    if kind == "sampled_softmax":
        each = torch.cat([right[:, None], wrong.masked_fill(same, -torch.inf)], dim=1).logsumexp(dim=1) - right
    elif kind == "bce":
        each = F.softplus(-right) + F.softplus(wrong).masked_fill(same, 0.0).mean(dim=1)
    else:
        each = F.softplus(wrong - right[:, None]).masked_fill(same, 0.0).mean(dim=1)
    return each.sum(), torch.tensor(len(targets))
