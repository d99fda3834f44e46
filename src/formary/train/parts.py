"""Tensors of which a process holds a part (torch's DTensor, under fsdp): all of them, a part of a whole one, their norm.

Where there are no parts, a tensor is its own whole. What is whole on one process has to be so on all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; where it does, all processes have to call it."""
    return tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Of a whole tensor the part that `other`, of the same shape, is; every process has to hold the whole."""
    if not _is_part(other) or _is_part(tensor) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there = tensor.to(other.device)
    return distribute_tensor(there, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]


def norm_of(tensors: list[Tensor]) -> float:
    """The 2-norm of all of them together, those parts included that other processes hold."""
    return float(whole(torch.nn.utils.get_total_norm(tensors)))


def _is_part(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor.data, DTensor)
