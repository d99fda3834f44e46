"""How one training lies over the processes of a run: every process learns from its part of the batch, and they add up.

Under ddp each process holds the whole network and gradients are summed (Li et al. 2020); under fsdp each holds a part of
every weight, gradient and moment, and a block is whole only while it computes (Zhao et al. 2023). Both are torch's; here the
batch is cut, and tensors come apart and together again, so that checkpoints do not depend on how many processes there were.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from formary.errors import RecipeError
from formary.model.block import Block
from formary.model.topologies import Network
from formary.tasks.protocol import Batch, read_of
from formary.train.average import put_weights, weights_of
from formary.train.parts import whole
from formary.train.processes import ALONE
from formary.train.rng import seed_all

if TYPE_CHECKING:
    from formary.train.machine import Runtime

Loss = Callable[[Network, Batch], tuple[Tensor, Tensor]]
"""The summed loss of a batch in nats and the number of predictions in it, both scalars."""

Kind = Literal["none", "ddp", "fsdp"]

_PATIENCE = timedelta(minutes=30)  # for one another's gradients; what takes longer than a step waits elsewhere
_STATE_BYTES = 16  # of a weight that trains: itself, its gradient and two moments in float32
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_ROOM = 0.5  # of the memory may go to them; the rest is for activations


class Spread:
    """A training as it lies over the processes.

    Args:
        network: what learns here: the caller's own network, or under fsdp a copy of which this process holds a part.
        loss: of a batch of this process, through which gradients are summed over all; `network` has to be its first argument.
        measured_loss: the same for measuring, never compiled.
    """

    def __init__(
        self,
        loss_of: Loss,
        network: Network,
        runtime: Runtime,
        *,
        batch: Callable[[], Batch] | None = None,
        compiled: bool = False,
    ) -> None:
        """`batch` gives any batch of the training: a small pass over it shows which weights the loss does not use."""
        self.processes, self.runtime = runtime.processes, runtime
        self.kind = kind_for(runtime.parallel, network, runtime)
        self.network, self._plain = network, network
        self.loss, self.measured_loss = loss_of, loss_of
        self._module: nn.Module | None = None
        if compiled and self.kind != "fsdp":
            self.loss = torch.compile(loss_of)
        if self.kind == "ddp":
            unused = batch is not None and _leaves_weights_out(loss_of, network, batch(), runtime)
            self._module = _replicated(_Learning(network, self.loss), runtime, unused=unused)
            self.loss = self._through_module
        elif self.kind == "fsdp":
            self.network = copy.deepcopy(network)
            _empty(network)
            if compiled:
                for block in _blocks(self.network):
                    block.compile()
            self._module = _sharded(_Learning(self.network, loss_of), runtime)
            self.loss = self.measured_loss = self._through_module

    @classmethod
    def alone(cls, loss_of: Loss, network: Network, runtime: Runtime) -> Spread:
        """That of a process which learns by itself, whether there are others or not."""
        return cls(loss_of, network, dataclasses.replace(runtime, processes=ALONE))

    @property
    def gradient_factor(self) -> int:
        """What the gradients after a backward pass have to be multiplied with to be the sums over all processes."""
        return self.processes.count if self.kind == "ddp" else 1

    def pieces(
        self, batch: Batch, micro_batch: int | None
    ) -> Iterator[tuple[Batch, bool, AbstractContextManager[Any]]]:
        """The part of the batch that this process learns from, in pieces of at most `micro_batch` sequences.

        Every process gets as many pieces as the others; where there are too few sequences, the last ones do not count.

        Yields:
            the piece, whether it counts, and the context in which its loss and gradient are to be computed.
        """
        size, rank, count = len(read_of(batch)), self.processes.rank, self.processes.count
        begin, end = size * rank // count, size * (rank + 1) // count
        largest = -(-size // count)
        most = micro_batch or max(largest, 1)
        starts = range(begin, begin + largest, most)
        for start in starts:
            stop = min(start + most, end)
            rows = slice(start, stop) if stop > start else slice(0, 1)
            part = {name: tensor[rows].to(self.runtime.device) for name, tensor in batch.items()}
            apart = self.kind == "ddp" and torch.is_grad_enabled() and start != starts[-1]
            yield part, stop > start, self._module.no_sync() if apart else nullcontext()  # type: ignore[union-attr,operator]

    def seed(self, seed: int, step: int) -> None:
        """Let what is drawn in a step follow from the seed, the step and the process, so that a resume need not know more.

        One process goes on with the random numbers it has.
        """
        if self.processes.count > 1:
            seed_all(int(np.random.SeedSequence([seed, step, self.processes.rank]).generate_state(1)[0]))

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the leader as one process would hold them; {} on the others. All processes have to call it."""
        if self.kind != "fsdp":
            return dict(tensors) if self.processes.leads else {}
        found = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.processes.leads:
                found[name] = full.detach().cpu()
        return found

    @contextmanager
    def lent(self) -> Iterator[Network | None]:
        """The whole network with its present weights on the leader, None on the others. All processes have to enter it."""
        if self.kind != "fsdp":
            yield self.network if self.processes.leads else None
            return
        weights = self.whole(weights_of(self.network))
        if not self.processes.leads:
            yield None
            return
        _fill(self._plain, weights, self.runtime.device)
        self._plain.train(self.network.training)
        try:
            yield self._plain
        finally:
            _empty(self._plain)

    def asked(self, question: Callable[[Network], Any]) -> Any:
        """What the leader answers of the whole network, on every process; it has to survive JSON."""
        with self.lent() as network:
            return self.processes.agree(question(network) if network is not None else None)

    def total(self, loss_sum: float, count: int) -> tuple[float, int]:
        """Summed losses and numbers of predictions over all processes."""
        loss_sum, total = self.processes.total(loss_sum, count)
        return loss_sum, int(total)

    def finish(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Leave the caller's network on the leader with these weights, or with its own; all processes have to call it.

        The networks of the other processes are of no use afterwards.
        """
        if self.kind != "fsdp":
            if weights is not None:
                put_weights(self.network, weights)
            return
        found = self.whole(weights if weights is not None else weights_of(self.network))
        if self.processes.leads:
            _fill(self._plain, found, self.runtime.device)

    def _through_module(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._module is not None
        found: tuple[Tensor, Tensor] = self._module(batch)
        if self.kind == "fsdp" and not torch.is_grad_enabled():  # otherwise the backward pass takes them apart again
            self._module.reshard()  # type: ignore[operator]
        return found


class _Learning(nn.Module):
    """A loss as a module, so that torch's wrappers see all that it makes of the weights, the head's part included."""

    def __init__(self, network: Network, loss_of: Loss) -> None:
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.loss_of(self.network, batch)


def kind_for(asked: str, network: Network, runtime: Runtime) -> Kind:
    """ddp or fsdp for several processes: as asked, or fsdp where weights, gradients and moments need most of the memory.

    Raises:
        RecipeError: `machine.parallel: none` with several processes.
    """
    if runtime.processes.count == 1:
        return "none"
    if asked == "none":
        raise RecipeError(
            f"machine.parallel: none, and {runtime.processes.count} processes were started; start one, or write auto, ddp or fsdp"
        )
    if asked in ("ddp", "fsdp"):
        return asked  # type: ignore[return-value]
    needed = _STATE_BYTES * sum(parameter.numel() for parameter in network.parameters())
    if runtime.device.type == "cuda":
        room = torch.cuda.get_device_properties(runtime.device).total_memory
    else:
        room = psutil.virtual_memory().total // runtime.processes.local_count
    return "fsdp" if runtime.processes.any(needed > _ROOM * room) else "ddp"


def recompute_activations(network: Network, wanted: bool) -> None:
    """Let blocks keep only what goes in, and compute the rest again in the backward pass (Chen et al. 2016)."""
    for block in _blocks(network):
        block.recompute = wanted


def _empty(network: Network) -> None:
    """Give the memory of the weights back; what the network computes from its config stays."""
    for parameter in network.parameters():
        parameter.data = parameter.new_empty(0)


def _fill(network: Network, weights: Mapping[str, Tensor], device: torch.device) -> None:
    for name, parameter in network.named_parameters():
        parameter.data = weights[name].to(device)


# torch's wrappers --------------------------------------------------------------------------------------------------------


def _blocks(network: nn.Module) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def _group(runtime: Runtime) -> Any:
    """The connections for gradients: nccl between GPUs, gloo between CPUs."""
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    return torch.distributed.new_group(backend=backend, timeout=_PATIENCE)


def _replicated(learning: _Learning, runtime: Runtime, *, unused: bool) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.12
    options: dict[str, Any] = {buffers: False}  # they are computed from the config
    return DistributedDataParallel(
        learning,
        process_group=_group(runtime),
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
        **options,
    )


def _sharded(learning: _Learning, runtime: Runtime) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if runtime.device.type == "cpu":
        _return_freed_memory()
    mesh = DeviceMesh.from_group(_group(runtime), runtime.device.type)
    for block in _blocks(learning.network):
        fully_shard(block, mesh=mesh)
    fully_shard(learning, mesh=mesh)
    for module in learning.modules():
        if isinstance(module, FSDPModule):  # sums, as the loss is one; gloo knows no averages
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return learning


def _return_freed_memory() -> None:
    """Let glibc give freed tensors back to the system at once: it would keep blocks of up to 32 MB, about what fsdp saves."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def _leaves_weights_out(loss_of: Loss, network: Network, batch: Batch, runtime: Runtime) -> bool:
    """Whether some weight that trains gets no gradient: ddp would wait for it."""
    part = {name: tensor[:1].to(runtime.device) for name, tensor in batch.items()}
    with torch.random.fork_rng(), runtime.autocast():
        loss_of(network, part)[0].backward()  # type: ignore[no-untyped-call]
    found = any(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    for parameter in network.parameters():
        parameter.grad = None
    return found
