"""Which vector should say which box: the cheapest pairs of detection tokens and boxes, and the boxes that patches lie in.

Boxes are centre, width and height as shares of the picture, or their corners. What is learned of a pair is the task's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from formary.recipe.schema import Objective

Pairs = tuple[Tensor, Tensor, Tensor]
"""Numbers of pictures, vectors and boxes, (pairs,) each."""

NONE = -1
"""Fills up the labels of pictures with fewer boxes."""


@torch.no_grad()
def matched(logits: Tensor, boxes: Tensor, true: Tensor, labels: Tensor, *, weights: Objective) -> Pairs:
    """The pairs of a token and a box, each at most once, that cost least together (Carion et al. 2020, eq. 1 and A.2).

    Args:
        logits: (batch, tokens, labels + 1).
        boxes: (batch, tokens, 4) that the tokens say.
        true: (batch, most, 4) boxes.
        labels: (batch, most) their labels, `NONE` where there is no box.
        weights: of the distance and of the overlap, beside the probability of the label.
    """
    from scipy.optimize import linear_sum_assignment

    sure = logits.softmax(dim=-1).gather(2, labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
    distance = (boxes[:, :, None] - true[:, None]).abs().sum(dim=-1)
    overlap = generalised_iou(cornered(boxes)[:, :, None], cornered(true)[:, None])
    costs = (weights.box_l1 * distance - weights.box_giou * overlap - sure).nan_to_num(1e6).cpu().numpy()
    found = []
    for number, count in enumerate((labels != NONE).sum(dim=1).tolist()):
        tokens, places = linear_sum_assignment(costs[number, :, :count])
        found.append(np.stack([np.full_like(tokens, number), tokens, places]))
    pictures, chosen, places = torch.from_numpy(np.concatenate(found, axis=1)).to(logits.device)
    return pictures, chosen, places


def lying(true: Tensor, labels: Tensor, *, side: int) -> Pairs:
    """Which patch's middle lies in which box, in the smallest where in several.

    Args:
        true, labels: as `matched`.
        side: how many patches a row has, and a column.
    """
    middles = (torch.arange(side, device=true.device) + 0.5) / side
    middle = torch.cartesian_prod(middles, middles).flip(1)[:, None]  # x, y of each patch, row by row
    corners = cornered(true)[:, None]
    inside = ((corners[..., :2] < middle) & (middle < corners[..., 2:])).all(dim=-1) & (labels != NONE)[:, None]
    area = true[..., 2:].prod(dim=-1)[:, None].masked_fill(~inside, torch.inf)
    pictures, patches = inside.any(dim=-1).nonzero(as_tuple=True)
    return pictures, patches, area.argmin(dim=-1)[pictures, patches]


def cornered(boxes: Tensor) -> Tensor:
    """Centre, width and height (..., 4) as left, top, right and bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def centred(corners: Tensor) -> Tensor:
    """The reverse of `cornered`."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalised_iou(one: Tensor, other: Tensor) -> Tensor:
    """IoU less the share of the smallest box around both that neither covers (Rezatofighi et al. 2019), of corners (..., 4)."""
    area, other_area = (boxes[..., 2:].sub(boxes[..., :2]).prod(dim=-1) for boxes in (one, other))
    common = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    around = (torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])).prod(dim=-1)
    inside = common.prod(dim=-1)
    union = area + other_area - inside
    return inside / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)
