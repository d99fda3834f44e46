"""Update rules, and which weights get which: matrices decay, norms and biases do not.

AdamW, Adam and SGD are torch's (fused where it has that); Muon is here because torch's takes one matrix at a time.
An `Optimiser` is a few torch optimisers that step together, with peak rates the schedule scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from formary.recipe import schema
from formary.train.parts import part_like, whole


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix (Jordan et al. 2024), for hidden matrices.

    Matrices of one shape are orthogonalised together; where processes hold parts of them, by every process. The update is scaled by sqrt(max(1, rows / columns)).
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is what the orthogonalisation computes in; bfloat16 is enough where the hardware is fast at it."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                buffers = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    buffers.append(state["momentum"])
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                # Nesterov's look-ahead: the gradient moved towards the momentum.
                ahead = [whole(matrix) for matrix in torch._foreach_lerp(gradients, buffers, group["momentum"])]
                updates = orthogonalise(torch.stack(ahead).to(self.dtype)).to(ahead[0].dtype)
                own = [part_like(update, parameter) for update, parameter in zip(updates.unbind(), parameters)]
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, own, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of (count, rows, columns) near 1 by a quintic Newton-Schulz iteration.

    The coefficients grow small singular values fastest and leave all between about 0.7 and 1.2 (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Optimiser:
    """The optimisers of a run behind one `step`; `lr_factor` scales every group's peak rate."""

    def __init__(
        self,
        network: nn.Module,
        settings: schema.Optimiser,
        *,
        dtype: torch.dtype = torch.float32,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        """`dtype`: see `Muon`; `lr_scale` gives the share of the learning rate that a weight has by its name."""
        self.l1 = settings.l1
        self.named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.matrices = [parameter for parameter in self.named.values() if parameter.ndim >= 2]
        self.parts = _parts(self.named, settings, dtype, lr_scale)
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def step(self, lr_factor: float) -> None:
        """One update from the gradients in place, at `lr_factor` of the peak rates; then the gradients are cleared."""
        if self.l1:
            for matrix in self.matrices:
                if matrix.grad is not None:
                    matrix.grad.add_(matrix.detach().sign(), alpha=self.l1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            part.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every moment and counter as "parameter/field", for a checkpoint."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.named.items()}
        return {
            f"{names[parameter]}/{field}": value if isinstance(value, Tensor) else torch.tensor(value)
            for part in self.parts
            for parameter, fields in part.state.items()
            for field, value in fields.items()
            if value is not None
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        owners = {
            parameter: part for part in self.parts for group in part.param_groups for parameter in group["params"]
        }
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            parameter = self.named[name]
            value = part_like(value, parameter)
            own_device = value.shape == parameter.shape or owners[parameter].defaults.get("fused")  # else a counter
            owners[parameter].state[parameter][field] = value.to(parameter.device if own_device else "cpu", copy=True)


def _parts(
    named: dict[str, nn.Parameter], settings: schema.Optimiser, dtype: torch.dtype, lr_scale: Callable[[str], float]
) -> list[torch.optim.Optimizer]:
    hidden: dict[float, list[nn.Parameter]] = defaultdict(list)
    rest: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named.items():
        scale = lr_scale(name)
        if settings.name == "muon" and parameter.ndim == 2 and ".blocks." in name:
            hidden[scale].append(parameter)
        else:
            rest[parameter.ndim >= 2, scale].append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr": settings.peak_lr * scale,
        }
        for (decays, scale), parameters in sorted(rest.items(), key=lambda item: (not item[0][0], -item[0][1]))
    ]
    fused = all(parameter.dtype == torch.float32 for parameter in named.values())
    parts: list[torch.optim.Optimizer] = []
    if groups and settings.name == "sgd":
        parts.append(torch.optim.SGD(groups, lr=settings.peak_lr, momentum=settings.momentum))
    elif groups and settings.name == "adam":
        parts.append(torch.optim.Adam(groups, lr=settings.peak_lr, betas=settings.betas, fused=fused))
    elif groups:
        parts.append(torch.optim.AdamW(groups, lr=settings.peak_lr, betas=settings.betas, fused=fused))
    if hidden:
        parts.append(
            Muon(
                [{"params": parameters, "lr": settings.matrix_lr * scale} for scale, parameters in hidden.items()],
                lr=settings.matrix_lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                dtype=dtype,
            )
        )
    return parts
