"""The processes of one run: who this one is, how they are started, and how they wait for and tell one another.

torchrun starts them and says in environment variables who is who; process 0 leads: it alone prepares, writes, speaks and
evaluates. What they compute together, and how a training lies over them, is `parallel`'s business.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from formary.errors import FormaryError

_PATIENCE = timedelta(
    days=14
)  # for what the leader does alone: preparing a corpus takes days, and a lost peer is noticed at once
_SHARED = 5.0  # seconds in which a mistake that is the leader's too ends the run
_STARTED = "FORMARY_STARTED"  # set for processes that `start` watches over and speaks for


class Lost(FormaryError):
    """Another process of the run is gone."""

    exit_code = 75  # EX_TEMPFAIL: the same command may well succeed


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run; the defaults are those of a run in one process.

    Every method that tells or waits has to be called by all processes.

    Args:
        rank: 0 is the leader.
        count: of all processes, on all machines.
        local_rank: among those on this machine.
        local_count: on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prepares, writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def agree(self, value: Any) -> Any:
        """The leader's value on every process; it must survive JSON. What the others give does not count."""
        if self.count == 1:
            return value
        import torch
        from torch import distributed

        data = json.dumps(value).encode() if self.leads else b""
        size = torch.tensor([len(data)])
        distributed.broadcast(size, 0)
        text = torch.tensor(list(data), dtype=torch.uint8) if self.leads else torch.empty(int(size), dtype=torch.uint8)
        distributed.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        import torch
        from torch import distributed

        sums = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        return self.total(float(flag))[0] > 0

    def share(self, things: Sequence[Any]) -> list[Any]:
        """Every `count`-th of the things, so that each belongs to one process."""
        return list(things[self.rank :: self.count])


ALONE = Processes()


def here() -> Processes:
    """What torchrun's environment says of this process.

    Raises:
        FormaryError: the environment is half there.
    """
    if "RANK" not in os.environ:
        return ALONE
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    except (KeyError, ValueError) as error:
        raise FormaryError(
            f"RANK is set and the rest of torchrun's environment is not as it should be ({error}); start several processes "
            "with `formary run RECIPE --processes N` or with torchrun, one process without RANK"
        ) from None
    return Processes(rank, count, *local)


@contextmanager
def joined() -> Iterator[Processes]:
    """This process as one of those that torchrun started, connected inside the block; ALONE where it started none.

    Raises:
        Lost: another process went away.
    """
    found = here()
    if found.count == 1:
        yield found
        return
    from torch import distributed

    if distributed.is_initialized():  # a run within a run
        yield found
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    with _noticing_loss(found):
        store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
        if found.local_count == found.count:  # a restart of all must not read the addresses of those that are gone
            store = PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
        try:
            yield found
        finally:
            if sys.exc_info()[0] is None:
                distributed.destroy_process_group()


@contextmanager
def _noticing_loss(found: Processes) -> Iterator[None]:
    """Turn what torch says when a peer has gone into one line."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        import socket

        raise Lost(
            f"process {found.rank} on {socket.gethostname()} has lost the other processes of the run (one of the {found.count} "
            "ended, or the network between them); the same command goes on from the last checkpoint"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    from torch import distributed

    said = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Socket closed",
        "recvValue failed",
        "connectFullMesh",
    )
    return isinstance(error, distributed.DistError) or any(sign in said for sign in signs)


def silent(error: FormaryError | None = None) -> bool:
    """Whether this process leaves it to another to tell the user: the leader speaks, of a lost process who started it.

    What went wrong on another process alone is told by that one: it waits until it would have been ended, had it gone
    wrong on the leader too.
    """
    follows, lost = os.environ.get("RANK", "0") != "0", isinstance(error, Lost)
    if not follows or error is None or lost or error.exit_code == 130:
        return follows or (lost and _STARTED in os.environ)
    time.sleep(_SHARED)
    return False


def end(code: int) -> None:
    """End this process at once, if it is still connected to others; else do nothing.

    At an orderly end the threads of a connection that was left in the middle would abort it.
    """
    distributed = sys.modules.get("torch.distributed")
    if "RANK" in os.environ and distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(arguments: Sequence[str], count: int) -> int:
    """Run `formary ARGUMENTS` in `count` processes on this machine, by torchrun's own launcher; returns the exit code.

    Raises:
        FormaryError: this already is one of several processes, or one of those started was killed.
    """
    if "RANK" in os.environ:
        raise FormaryError("--processes: torchrun has already started the processes of this run; leave it out")
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):  # what went wrong is told below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[_STARTED] = "1"
    if Path("/sys/class/net/lo").exists():  # the name of this machine need not be one that the network knows
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "formary", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval) if error.sigval != signal.SIGTERM else 130
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        told = [code for code in codes.values() if code > 0 and code != Lost.exit_code]
        killed = {rank: -code for rank, code in codes.items() if code < 0}
        if told or not killed:  # by the process itself
            return told[0] if told else Lost.exit_code
        rank, number = min(killed.items(), key=lambda item: (item[1] == signal.SIGTERM, item[0]))
        memory = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
        raise FormaryError(
            f"process {rank} of {count} (counted from 0) was killed ({signal.Signals(number).name}{memory}) and the others "
            "were stopped; the same command goes on from the last checkpoint"
        ) from None
    return 0
