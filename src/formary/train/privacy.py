"""Differentially private training: clipped gradients of single rows, summed, with Gaussian noise (DP-SGD, Abadi et al. 2016).

Opacus gives the gradient of each row, clips, adds the noise and counts epsilon; here are the rows that Poisson sampling
draws, the grad samplers of our own layers, and what a recipe may not ask for beside it. The update rule after the noise is
the recipe's: what is made from a private gradient alone stays private, so AdamW, schedules, decay and averages cost nothing.

The guarantee is for the training rows and for the weights. It does not cover validation and test rows, nor what else a
run writes down of its data (metrics.jsonl, the report).
"""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from formary.errors import DataError, FormaryError, MissingExtra, RecipeError
from formary.model.attention import ValueMix
from formary.model.embedders import TextEmbedder
from formary.model.heads import LanguageHead
from formary.model.norms import RMSNorm
from formary.model.topologies import Network
from formary.recipe import schema
from formary.recipe.schema import Recipe
from formary.tasks.protocol import Batch, Example, read_of
from formary.train.lora import LoraLinear
from formary.train.machine import Runtime

TASKS = ("classify", "tag", "causal_lm")
"""The tasks whose loss is a sum over rows that do not look at one another."""

IGNORED = -100
_ROWS, _NOISE = 0, 1  # a stream of random numbers for each purpose
_MOST_NOISE = 1000.0
_PIECE_BYTES = 1 << 28  # of gradients of single rows that are held at a time
_PIECE_ROWS = 32  # at most, on a CPU: what passes through the layers stays near its caches
# Between the sum of the rows' gradients and the gradient of the sum: relative, where they are bfloat16, and absolute.
_TOLERANCE, _TOLERANCE_HALF, _TINY = 1e-3, 5e-2, 1e-6

Loss = Callable[[Network, Batch], tuple[Tensor, Tensor]]
Draw = Callable[[int, np.random.Generator], Example | None]
"""What a drawn row gives to learn from this time: itself, or one of its windows; None where it has nothing."""


def check(recipe: Recipe) -> None:
    """Refuse what cannot be trained privately, or would tell of the rows beside the noise.

    Raises:
        RecipeError: the field is named, and what to do. MissingExtra: Opacus is not installed.
    """
    if recipe.privacy is None:
        return
    train, data = recipe.train, recipe.data
    refusals = {
        "task": recipe.task not in TASKS and f"{recipe.task} cannot be trained privately; {', '.join(TASKS)} can",
        "train.batch": train.batch == "auto" and "auto looks at the rows; give a number (256 or more suits the noise)",
        "train.optimiser.lr": train.optimiser.lr == "auto"
        and "auto learns from the rows without noise; give a number, chosen on validation rows or public data",
        "train.ramp": train.ramp is not None
        and "cuts packed windows, and here each document is drawn by itself; leave it out",
        "train.tune.lora_dropout": train.tune.lora_dropout > 0
        and "must be 0: which inputs were dropped is not known when the rows' gradients are made",
        "train.objective.class_weights": train.objective.class_weights != "none"
        and "balanced tells how many rows each class has; use none",
        "train.objective.transitions": recipe.task == "tag"
        and train.objective.transitions == "crf"
        and "a CRF's scores stand outside the layers whose gradients are made row by row; use repair",
        "data.tokenizer": recipe.model.start is None
        and data.tokenizer.path is None
        and data.tokenizer.kind != "bytes"
        and "a tokenizer trained on the rows tells of them; use kind: bytes, a path, or model.start",
        "data.augment": data.augment != type(data.augment)() and "puts one row into several; leave it out",
        "data.clean.near_duplicates": data.clean.near_duplicates is not None
        and "lets one row decide over several others; leave it out",
        "machine.compile": recipe.machine.compile and "hides the layers whose inputs are needed; use false",
        "machine": int(os.environ.get("WORLD_SIZE", "1")) > 1 and "a private training runs in one process",
    }
    for field, why in refusals.items():
        if why:
            raise RecipeError(f"{field}: {why} (the recipe has a privacy section)")
    if importlib.util.find_spec("opacus") is None:
        raise MissingExtra("privacy", "differentially private training")


class PrivateTraining:
    """Where the rows of each step, its gradient and the epsilon spent come from; see `batches` and `gradient`.

    Args:
        rows: how many rows there are to learn from; counts as public, as do the recipe and the names of labels.
        expected: rows that a step draws on average; each is drawn by itself with the chance expected / rows.

    Raises:
        DataError: too few rows for delta, or for the batch.
    """

    def __init__(self, settings: schema.Privacy, *, rows: int, expected: int) -> None:
        from opacus.accountants import create_accountant

        if settings.delta >= 1 / max(rows, 1):
            raise DataError(
                f"privacy.delta: {settings.delta:g} is not under 1 / {rows:,} training rows, so giving away a whole row "
                "would count as private; lower it, or have more rows (a long text is one row: see data.documents)"
            )
        if expected >= rows:
            raise DataError(
                f"train.batch: {expected} of {rows:,} training rows a step leaves nothing to chance; lower it"
            )
        self.settings, self.rows, self.expected = settings, rows, expected
        self.sample_rate = expected / rows
        self.steps, self.noise_multiplier = 0, 0.0
        self.accountant = create_accountant(mechanism=settings.accountant)
        self._secret = secrets.randbits(128) if settings.seed is None else settings.seed
        self._loss = 0.0  # the last that was finite
        self._dp: Any = None

    def plan(self, steps: int) -> PrivateTraining:
        """Set the noise so that epsilon is spent at the last of so many steps."""
        from opacus.accountants import create_accountant

        settings, self.steps = self.settings, steps
        accountant = create_accountant(mechanism=settings.accountant)

        def holds(noise: float) -> bool:
            accountant.history = [(noise, self.sample_rate, steps)]
            return float(accountant.get_epsilon(settings.delta)) <= settings.epsilon

        with _quiet():
            self.noise_multiplier = _least(holds)
        return self

    def says(self) -> str:
        """What is about to be done, in a sentence."""
        return (
            f"private: each of {self.rows:,} rows is drawn with chance {self.sample_rate:.3g} a step and clipped to "
            f"{self.settings.clip:g}, noise {self.noise_multiplier:.3f} x that; epsilon {self.settings.epsilon:g} at delta "
            f"{self.settings.delta:g} after {self.steps:,} steps"
        )

    def batches(self, draw: Draw, collate: Callable[[Sequence[Example]], Batch]) -> PoissonBatches:
        """Batches of the rows that are drawn."""
        return PoissonBatches(self, draw, collate)

    def random(self, step: int, purpose: int) -> np.random.Generator:
        """The random numbers of a step: a function of the secret, so that a resumed run draws the same once more."""
        return np.random.default_rng([self._secret, step, purpose])

    def attach(self, network: Network, *, micro_batch: int | None = None) -> None:
        """Watch the layers of `network` that train, whose weights must not be replaced from here on.

        Args:
            micro_batch: rows whose gradients are held at a time; what suits 256 MB and the device when left out.
        """
        from opacus.optimizers import DPOptimizer

        self._hooks = _hooks(network)
        self._embedders = [
            module.register_forward_pre_hook(_own_positions, with_kwargs=True)
            for module in network.modules()
            if isinstance(module, TextEmbedder) and module.positions is not None
        ]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        most = _PIECE_ROWS if trained[0].device.type == "cpu" else 8 * _PIECE_ROWS
        self.piece = micro_batch or max(1, min(most, _PIECE_BYTES // (4 * sum(p.numel() for p in trained))))
        self._dp = DPOptimizer(
            torch.optim.SGD(trained, lr=0.0),  # never steps: the recipe's optimiser does
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.settings.clip,
            expected_batch_size=self.expected,
            loss_reduction="sum",
            generator=torch.Generator(device=trained[0].device),
        )
        self._checked = False

    def detach(self) -> None:
        """Take the watching away again."""
        self._hooks.remove_hooks()
        for handle in self._embedders:
            handle.remove()
        for parameter in self._dp.params:
            for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
        self._dp = None

    def gradient(
        self, loss_of: Loss, network: Network, batch: Batch, settings: object, runtime: Runtime, spread: object = None
    ) -> tuple[float, int, float]:
        """Leave the private gradient of the step on the parameters, and count it.

        A row's loss is the mean over its predictions; its gradient is clipped to `clip`; the sum over the drawn rows plus
        noise of standard deviation noise_multiplier x clip is divided by the number of rows that a step is expected to
        draw. A row whose gradient is not finite is left out. No step may be skipped for what its loss was. It stands in
        for `loop.gradient`, whose `settings` and `spread` have no say here.

        Returns:
            Mean loss in nats (not private), number of predictions, norm of the private gradient.
        """
        size, loss_sum, count = len(read_of(batch)), 0.0, 0
        for parameter in self._dp.params:
            parameter.summed_grad = torch.zeros_like(parameter)
        for start in range(0, size, self.piece):
            part = {name: tensor[start : start + self.piece].to(runtime.device) for name, tensor in batch.items()}
            with runtime.autocast():
                summed, predictions = loss_of(network, part)
            with warnings.catch_warnings():  # the first layer that trains has inputs without a gradient
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                summed.backward()  # type: ignore[no-untyped-call]
            self._weigh(part)
            self._dp.clip_and_accumulate()
            self._forget()
            loss_sum, count = loss_sum + float(summed.detach()), count + int(predictions)
        step = sum(steps for *_, steps in self.accountant.history)
        self._dp.generator.manual_seed(int(self.random(step, _NOISE).integers(2**63)))
        self._dp.add_noise()
        gradients = [parameter.grad for parameter in self._dp.params]
        torch._foreach_div_(gradients, float(self.expected))
        for parameter in self._dp.params:
            parameter.summed_grad = None
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        self._loss = loss_sum / count if count and math.isfinite(loss_sum) else self._loss
        return self._loss, count, float(torch.nn.utils.get_total_norm(gradients))

    def spent(self, step: int) -> dict[str, float]:
        """{"epsilon": ...} about a hundred times in a run, as it takes a moment to count; {} else."""
        return {"epsilon": self.epsilon} if step % max(1, self.steps // 100) == 0 or step == self.steps else {}

    @property
    def epsilon(self) -> float:
        """What has been spent so far, at the recipe's delta."""
        with _quiet():
            return float(self.accountant.get_epsilon(self.settings.delta)) if self.accountant.history else 0.0

    def facts(self) -> dict[str, Any]:
        """What the card and the report say of it, JSON-able; the secret is not in it."""
        import opacus

        return {
            "epsilon": self.epsilon,
            "target_epsilon": self.settings.epsilon,
            "delta": self.settings.delta,
            "clip": self.settings.clip,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "rows": self.rows,
            "steps": sum(steps for *_, steps in self.accountant.history),
            "accountant": self.settings.accountant,
            "opacus": opacus.__version__,
            "seeded": self.settings.seed is not None,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able: the accountant's history, and the secret that draws rows and noise."""
        return {**self.accountant.state_dict(), "secret": f"{self._secret:x}"}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        history = [tuple(entry) for entry in state["history"]]
        self.accountant.load_state_dict({"history": history, "mechanism": state["mechanism"]})
        self._secret = int(state["secret"], 16)

    @torch.no_grad()
    def _weigh(self, part: Batch) -> None:
        """Make the gradients of rows those of their mean loss, and leave out rows where one is not finite."""
        size, parameters = len(read_of(part)), self._dp.params
        if not self._checked:
            _check_sums(parameters)
            self._checked = True
        for parameter in parameters:
            if parameter.grad_sample is None:  # the loss does not depend on it
                parameter.grad_sample = parameter.new_zeros(1).expand(size, *parameter.shape)
            elif parameter.grad_sample.dtype != parameter.dtype:  # made under autocast; clipped in full precision
                parameter.grad_sample = parameter.grad_sample.to(parameter.dtype)
        counts = _predictions(part)
        if bool((counts != 1).any()):
            for parameter in parameters:
                shape = (size, *(1 for _ in parameter.shape))
                parameter.grad_sample = parameter.grad_sample / counts.view(shape).to(parameter.dtype)
        finite = torch.ones(size, dtype=torch.bool, device=counts.device)
        for parameter in parameters:
            finite &= parameter.grad_sample.flatten(1).sum(dim=1).isfinite()
        if not bool(finite.all()):
            for parameter in parameters:
                parameter.grad_sample = parameter.grad_sample.clone()
                parameter.grad_sample[~finite] = 0.0

    def _forget(self) -> None:
        for parameter in self._dp.params:
            parameter.grad_sample, parameter.grad = None, None


class PoissonBatches:
    """Every row is in a step's batch by a throw of its own, so batches differ in size and may be empty.

    Rows come longest first, so that pieces of the batch have little padding.
    """

    def __init__(self, private: PrivateTraining, draw: Draw, collate: Callable[[Sequence[Example]], Batch]) -> None:
        self.private, self.draw, self.collate = private, draw, collate
        self.steps_per_epoch = -(-private.rows // private.expected)

    def rows(self, step: int) -> NDArray[np.int64]:
        """The numbers of the rows that a step draws."""
        return self._drawn(step)[0]

    def batch(self, step: int) -> Batch:
        rows, rng = self._drawn(step)
        found = [example for row in rows if (example := self.draw(int(row), rng)) is not None]
        if found:
            return self.collate(sorted(found, key=lambda example: -len(example.inputs)))
        any_row = next(example for row in range(self.private.rows) if (example := self.draw(row, rng)) is not None)
        return {name: tensor[:0] for name, tensor in self.collate([any_row]).items()}

    def _drawn(self, step: int) -> tuple[NDArray[np.int64], np.random.Generator]:
        rng = self.private.random(step, _ROWS)
        return np.flatnonzero(rng.random(self.private.rows) < self.private.sample_rate), rng


def one_of_each(examples: Iterable[Example], rows: int) -> Draw:
    """Draws for labelled rows: of a row that is read in several windows, one of them."""
    by_row: list[list[Example]] = [[] for _ in range(rows)]
    for example in examples:
        by_row[example.row].append(example)

    def draw(row: int, rng: np.random.Generator) -> Example | None:
        own = by_row[row]
        return own[int(rng.integers(len(own)))] if own else None

    return draw


def _least(holds: Callable[[float], bool]) -> float:
    """The least noise multiplier that holds, from above and to 0.3 %: Opacus' own search need not end."""
    high = 1.0
    while not holds(high):
        high *= 2
        if high > _MOST_NOISE:
            raise RecipeError("privacy.epsilon: no noise is enough for so little at this delta; raise it")
    low = high / 2
    while low > 1 / _MOST_NOISE and holds(low):
        low, high = low / 2, low
    while high - low > 3e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the accountants say of bounds that they use on the way, not of the result."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="opacus")
        yield


def _predictions(part: Batch) -> Tensor:
    """(rows,) how many predictions the loss of each row is summed over, 1 at least."""
    targets = part["targets"]
    if targets.ndim < 2 or targets.is_floating_point():
        return torch.ones(len(targets), device=targets.device)
    return (targets != IGNORED).sum(dim=1).clamp(min=1)


def _check_sums(parameters: Sequence[Any]) -> None:
    """See that the rows' gradients add up to the gradient that autograd found: a weight used past its layer would not.

    Raises:
        FormaryError: they do not, so that clipping them would promise what is not so.
    """
    for parameter in parameters:
        whole, rows = parameter.grad, parameter.grad_sample
        if whole is None or not bool(whole.isfinite().all()):
            continue
        tolerance = _TOLERANCE if rows is None or rows.dtype == whole.dtype else _TOLERANCE_HALF
        if rows is None or float((rows.float().sum(dim=0) - whole).norm()) > tolerance * float(whole.norm()) + _TINY:
            raise FormaryError(
                f"privacy: a weight of shape {tuple(parameter.shape)} is used outside its layer, where the gradients of "
                "single rows cannot be seen; train other weights (train.tune), or without privacy"
            )


def _own_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Look up the learned positions for each row, as a gradient that all rows share cannot be taken apart."""
    tokens, given = args[0], kwargs.get("positions")
    places = torch.arange(tokens.shape[1], device=tokens.device)[None] if given is None else given
    return args, {**kwargs, "positions": places.expand(tokens.shape)}


def _hooks(network: Network) -> Any:
    """Opacus' hooks on the layers that train, with samplers for those of our layers that it does not know."""
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    class Hooks(GradSampleHooks):  # type: ignore[misc]
        GRAD_SAMPLERS = {  # noqa: RUF012
            **GradSampleModule.GRAD_SAMPLERS,
            RMSNorm: _rms_norm_samples,
            LanguageHead: _head_samples,
            ValueMix: _mix_samples,
            LoraLinear: _lora_samples,
        }

        def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
            if isinstance(module, LoraLinear):  # its updates lie in lists, which are modules that nothing goes through
                yield module
            else:
                if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                    yield module
                    if type(module) not in self.GRAD_SAMPLERS:
                        return
                for child in module.children():
                    yield from self.iterate_submodules(child)

        def capture_activations_hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(module, LoraLinear):
                super().capture_activations_hook(module, inputs, output)
            elif module.training and torch.is_grad_enabled():
                if not hasattr(module, "activations"):
                    module.activations = []  # type: ignore[assignment]
                module.activations.append([tensor.detach() for tensor in inputs])  # type: ignore[operator, union-attr]
                for parameter in (*module.lora_a, *module.lora_b):
                    parameter._forward_counter += 1

    return Hooks(network, loss_reduction="sum", strict=False)


def _rms_norm_samples(layer: RMSNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    normed = F.rms_norm(activations[0].to(backprops.dtype), layer.weight.shape, eps=layer.eps)
    return {layer.weight: torch.einsum("n...w,n...w->nw", normed, backprops)}


def _head_samples(layer: LanguageHead, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    inputs = layer.prepare(activations[0].to(backprops.dtype))
    if layer.cap is not None:
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        capped = layer.capped(F.linear(inputs, layer.weight.to(inputs.dtype), bias))
        backprops = backprops * (1 - (capped / layer.cap).square())
    found = {layer.weight: torch.einsum("n...v,n...w->nvw", backprops, inputs)}
    return found | ({layer.bias: torch.einsum("n...v->nv", backprops)} if layer.bias is not None else {})


def _mix_samples(layer: ValueMix, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    both = [torch.einsum("n...w,n...w->n", given.to(backprops.dtype), backprops) for given in activations]
    return {layer.weight: torch.stack(both, dim=1)}


def _lora_samples(layer: LoraLinear, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    inputs, found = activations[0].to(backprops.dtype), dict[nn.Parameter, Tensor]()
    for gradient, a, b in zip(torch.split(backprops, layer.rows, dim=-1), layer.lora_a, layer.lora_b, strict=True):
        found[b] = torch.einsum("n...o,n...r->nor", gradient, layer.scale * F.linear(inputs, a.to(inputs.dtype)))
        found[a] = torch.einsum("n...r,n...i->nri", layer.scale * (gradient @ b.to(inputs.dtype)), inputs)
    return found
