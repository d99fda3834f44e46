"""How labelled tasks read texts: tokens with the family's special tokens around them, cut to the context, padded.

Shared by the tasks whose rows are texts; a task adds targets and turns numbers back into answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formary.data.buckets import LengthBuckets, by_length
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError
from formary.model.topologies import Decoder, Encoder, Network
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch, Example, LabelledTask, Precision, Progress, Row, read_of

_AT_ONCE = {"cpu": 1024}  # padded tokens in a batch of predictions: what passes between layers stays in the cache
_ELSEWHERE = 16384


@dataclass(frozen=True)
class Reading:
    """A text, or a pair, as tokens.

    Args:
        tokens: (seq,) with special tokens.
        types: (seq,) token types; 1 in the second text of a pair.
        offsets: (seq, 2) the characters of its own text that each token stands for; (0, 0) at special tokens.
        part: (seq,) 0 for tokens of the first text, 1 of the second, -1 for special tokens.
        cut: whether tokens were left out to fit the context.
    """

    tokens: NDArray[np.int64]
    types: NDArray[np.int64]
    offsets: NDArray[np.int64]
    part: NDArray[np.int64]
    cut: bool


class Reader:
    """Reads texts with a tokenizer for models of at most `context` tokens."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.cut = 0  # texts that were cut so far

    def read(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> list[Reading]:
        """Read each text, with its pair where there is one; of a pair the longer text is cut first."""
        backend = self.tokenizer.backend
        firsts = backend.encode_batch(list(texts), add_special_tokens=False)
        given = [pair for pair in pairs or () if pair is not None]
        seconds = iter(backend.encode_batch(given, add_special_tokens=False))
        read = []
        for number, first in enumerate(firsts):
            second = next(seconds) if pairs is not None and pairs[number] is not None else None
            room = self.context - backend.num_special_tokens_to_add(second is not None)
            keep, keep_pair = shares(len(first.ids), len(second.ids) if second else 0, room)
            cut = keep < len(first.ids) or (second is not None and keep_pair < len(second.ids))
            first.truncate(keep)
            if second is not None:
                second.truncate(keep_pair)
            self.cut += cut
            read.append(self._reading(backend.post_process(first, second, True), cut))
        return read

    def _reading(self, encoding: Any, cut: bool) -> Reading:
        ids = encoding.ids
        if not ids:  # an empty text of a model without special tokens around it
            start = next((t for t in (self.tokenizer.bos_id, self.tokenizer.eos_id) if t is not None), 0)
            return Reading(np.array([start]), np.array([0]), np.array([[0, 0]]), np.array([-1]), cut)
        part = [-1 if number is None else number for number in encoding.sequence_ids]
        return Reading(
            np.array(ids, dtype=np.int64),
            np.array(encoding.type_ids, dtype=np.int64),
            np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
            np.array(part, dtype=np.int64),
            cut,
        )

    def notes(self) -> list[str]:
        """A sentence about texts that were cut, if any."""
        if not self.cut:
            return []
        many = "1 text was" if self.cut == 1 else f"{self.cut:,} texts were"
        return [
            f"{many} longer than the context of {self.context} tokens and cut to it; raise train.context to keep more"
        ]


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each of two texts fit into `room`; the longer gives way first, down to equal halves."""
    room = max(room, 0)
    if first + second <= room:
        return first, second
    half = room // 2
    if second <= half:
        return room - second, second
    if first <= half:
        return first, room - first
    return room - half, half


def padded(rows: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    """Rows of different length as (batch, longest), padded on the right with `value`."""
    filled = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = row
    return torch.from_numpy(filled)


def collated(examples: Sequence[Example], pad_id: int | None) -> Batch:
    """Tokens, types and the mask of real tokens of a batch; (batch, seq) each."""
    tokens = padded([example.inputs for example in examples], pad_id or 0)
    lengths = torch.tensor([len(example.inputs) for example in examples])
    batch = {"tokens": tokens, "mask": torch.arange(tokens.shape[1])[None] < lengths[:, None]}
    if any(example.types is not None for example in examples):
        zeros = [np.zeros(len(e.inputs), dtype=np.int64) if e.types is None else e.types for e in examples]
        batch["types"] = padded(zeros, 0)
    return batch


def hidden_states(network: Network, batch: Batch, *, for_summary: bool = False) -> Tensor:
    """What an encoder or a decoder makes of a batch: (batch, seq, width).

    A decoder needs no mask: padding is on the right, where nothing before it looks.

    Args:
        for_summary: only what `network.summary` reads is needed; that may be the first position alone.
    """
    if isinstance(network, Encoder):
        mask = batch.get("mask")
        mask = None if mask is None or bool(mask.all()) else mask
        return network(
            read_of(batch), mask=mask, types=batch.get("types"), first_only=for_summary and network.reads_first
        )
    assert isinstance(network, Decoder)
    return network(read_of(batch))


class RowBatches:
    """Training batches of rows of like length."""

    def __init__(self, task: LabelledTask, examples: Sequence[Example], train: Train) -> None:
        self.task, self.examples = task, examples
        self.changed = getattr(task, "training_batch", None)
        self.buckets = LengthBuckets([len(e.inputs) for e in examples], batch=train.batch_size, seed=train.seed)
        self.steps_per_epoch = self.buckets.steps_per_epoch

    def batch(self, step: int) -> Batch:
        chosen = [self.examples[row] for row in self.buckets.rows(step)]
        return self.changed(chosen, step) if self.changed else self.task.collate(chosen)


def in_batches(
    task: LabelledTask, examples: Sequence[Example], *, tokens: int = _AT_ONCE["cpu"], batch: int | None = None
) -> Iterator[Batch]:
    """Every example once, like lengths together, for measuring.

    Args:
        batch: so many in each, in their order, where the rows of a batch are contrasted with one another: its size is then
            part of what is measured.
    """
    if batch is not None:
        for start in range(0, len(examples), batch):
            yield task.collate(examples[start : start + batch])
        return
    for rows in by_length([len(example.inputs) for example in examples], tokens=tokens):
        yield task.collate([examples[row] for row in rows])


@torch.inference_mode()
def outputs(
    task: LabelledTask,
    network: Network,
    examples: Sequence[Example],
    answer: Any,
    *,
    precision: Precision,
    progress: Progress | None = None,
) -> list[Any]:
    """`answer(network, batch)` for all examples, in their order; it returns one thing per sequence of the batch."""
    found: list[Any] = [None] * len(examples)
    done = 0
    training, device = network.training, next(network.parameters()).device
    network.eval()
    try:
        with precision():  # once: what autocast makes of the weights is kept within
            most = _AT_ONCE.get(device.type, _ELSEWHERE)
            for rows in by_length([len(example.inputs) for example in examples], tokens=most):
                batch = {name: tensor.to(device) for name, tensor in task.collate([examples[r] for r in rows]).items()}
                for row, one in zip(rows, answer(network, batch), strict=True):
                    found[row] = one
                done += len(rows)
                if progress:
                    progress(done, len(examples))
    finally:
        network.train(training)
    return found


def text_of(row: Row, column: str, where: str) -> str:
    """A row's text.

    Raises:
        DataError: the column is missing or holds something else.
    """
    value = row.get(column)
    if not isinstance(value, str):
        said = "is missing" if column not in row else f"holds {type(value).__name__} {value!r:.40}, not a text"
        raise DataError(f"{where}: field '{column}' {said}; map another column with data.columns.{column}")
    return value


def windows(sizes: Sequence[int], *, room: int, shared: int) -> list[tuple[int, int]]:
    """Stretches of consecutive units that fit into `room` and together cover all of them: [(start, stop), ...].

    Args:
        sizes: tokens of each unit; one larger than `room` counts as `room`.
        shared: tokens that neighbouring stretches have in common at most; fewer where units are large.
    """
    ends = np.concatenate([[0], np.cumsum(np.minimum(sizes, room))]).astype(np.int64)
    found = []
    start, count = 0, len(sizes)
    while True:
        stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        found.append((start, stop))
        if stop >= count:
            return found
        earliest = max(int(ends[stop]) - shared, int(ends[stop + 1]) - room)
        start = max(start + 1, min(stop, int(np.searchsorted(ends, earliest, side="left"))))


def owned(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each unit's one stretch of `windows`, that in which it stands further from an edge: what they share is halved."""
    cuts = [(start + stop) // 2 for (start, _), (_, stop) in zip(stretches[1:], stretches[:-1])]
    return list(zip([stretches[0][0], *cuts], [*cuts, stretches[-1][1]]))


def first_seen(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each unit's one stretch of `windows` for a causal model: the first, in which the most stands before it."""
    ends = [0, *(stop for _, stop in stretches)]
    return [(max(start, before), stop) for (start, stop), before in zip(stretches, ends)]


def place_of(row: Row, where: str) -> str:
    """How an error calls a row: by its number, and by its id where it has one."""
    return f"{where} (id {row['id']})" if row.get("id") is not None else where
