"""What a model sees at each step: windows of the token stream, scored windows, and segments of documents.

The one idea: a batch is a pure function of (seed, step), so a resumed run and any number of processes see the same
order, and every token has its turn once per epoch. Masking, targets of the objectives and tensors are the tasks'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from formary.data.shards import TokenShards
from formary.data.tokenizer import IntArray
from formary.errors import DataError, RecipeError

IGNORED = -100  # a target that is not scored

# One stream of random numbers per purpose, so that adding a purpose changes no other.
_ORDER, _OFFSET, _PACKING, _CUTS, _PAIRS = range(5)


class Windows:
    """Windows of `context` + 1 tokens over the whole split, documents packed end to end (causal training).

    Each epoch has a new order and a new offset of the grid of windows, and visits every window once. Neighbouring
    windows share one token: the last target of one is the first input of the next.
    """

    def __init__(self, shards: TokenShards, *, context: int, batch: int, seed: int, document_ids: bool = False) -> None:
        """Raises DataError when the split holds fewer than context + 1 tokens."""
        targets = shards.tokens - 1
        if targets < context:
            raise DataError(
                f"{shards.folder}: the split holds {shards.tokens} tokens in {shards.documents} documents, and one "
                f"window needs train.context + 1 = {context + 1}; lower train.context to {max(targets, 0)} or less, "
                "add data (data.sources), or give this split a larger share (data.split)"
            )
        self.shards = shards
        self.context = context
        self.batch_size = batch
        self.seed = seed
        self.document_ids = document_ids
        # Room for the offset to move by a whole window, as long as one window is left.
        self.windows_per_epoch = max(1, (targets - (context - 1)) // context)
        self._offsets = min(targets - self.windows_per_epoch * context, context - 1) + 1
        self._epoch = -1
        self._order: IntArray = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every window of an epoch has been seen (the last step may begin the next epoch)."""
        return -(-self.windows_per_epoch // self.batch_size)

    def starts(self, step: int) -> IntArray:
        """Where in the token stream the windows of a step begin: (batch,) int64."""
        counts = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(counts, self.windows_per_epoch)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            offset = int(_raw(self.seed, _OFFSET, int(epoch), 1)[0] % np.uint64(self._offsets))
            starts[here] = offset + self._permutation(int(epoch))[places[here]] * self.context
        return starts

    def batch(self, step: int) -> dict[str, IntArray]:
        """`tokens` (batch, context + 1) int64; with document_ids also `documents` of the same shape."""
        positions = self.starts(step)[:, None] + np.arange(self.context + 1, dtype=np.int64)
        found = {"tokens": self.shards.array[positions].astype(np.int64)}
        if self.document_ids:
            found["documents"] = self.shards.document_of(positions)
        return found

    def _permutation(self, epoch: int) -> IntArray:
        if epoch != self._epoch:
            self._order = _shuffled(self.windows_per_epoch, self.seed, _ORDER, epoch)
            self._epoch = epoch
        return self._order


def ramp_lengths(first: int, context: int) -> list[int]:
    """The lengths of sequences on the way to the context, each twice the one before.

    Raises:
        RecipeError: doubling `first` does not lead to the context.
    """
    lengths = [first]
    while lengths[-1] < context:
        lengths.append(2 * lengths[-1])
    if lengths[-1] != context or len(lengths) < 2:
        fitting = [
            str(context >> halved) for halved in range(1, 12) if not context % (1 << halved) and context >> halved > 1
        ]
        raise RecipeError(
            f"train.ramp.first: {first} tokens do not double to train.context {context}; "
            + (f"take one of {', '.join(fitting)}" if fitting else "the context has to be even")
        )
    return lengths


# --- evaluation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredBatch:
    """Windows to evaluate. Rows are padded on the right (tokens 0, targets IGNORED) to the longest among them.

    A row's scored targets are consecutive tokens of the split, the first of them at `position`; so the losses of row
    r belong to the tokens position[r], position[r] + 1, ...
    """

    tokens: IntArray  # (rows, width) int64, width <= context
    targets: IntArray  # (rows, width) int64: the next token, IGNORED where it is not scored
    document: IntArray  # (rows,) int64: the document that the row's first scored target belongs to
    position: IntArray  # (rows,) int64: where in the split that target is


def scored_windows(
    shards: TokenShards,
    *,
    context: int,
    stride: int | None = None,
    rows: int = 16,
    max_tokens: int | None = None,
    by_length: bool = False,
) -> Iterator[ScoredBatch]:
    """Every document by itself, every token scored exactly once, with at least context - stride tokens before it.

    The first token of a document is scored after the token that stands before documents (`shards.begin_id`), or not
    at all where the tokenizer has none. `stride` (default half the context) new tokens are scored per window after
    a document's first. `max_tokens` stops after so many targets, within a document if need be. A batch holds up to
    rows x context positions, so short documents come more to a batch. Rows come in the order of the split, unless
    `by_length` groups rows of similar length, which saves padding where documents are short.
    """
    stride = max(1, context // 2) if stride is None else min(stride, context)
    if stride < 1:
        raise ValueError(f"stride {stride} must be at least 1")
    found = _document_rows(shards, context, stride, max_tokens)
    if by_length:
        found = _sorted_stretches(found, 64 * rows)
    gathered: list[_Row] = []
    width = 0
    for row in found:
        width = max(width, len(row.tokens))
        if gathered and width * (len(gathered) + 1) > rows * context:
            yield _padded(gathered)
            gathered, width = [], len(row.tokens)
        gathered.append(row)
    if gathered:
        yield _padded(gathered)


def stream_windows(
    shards: TokenShards, *, context: int, batch: int = 16, max_tokens: int | None = None
) -> Iterator[ScoredBatch]:
    """The whole split as one stream in windows that do not overlap, as nanoGPT measures: every token but the first.

    Documents are packed end to end, so a window may begin in one and end in another. Rows come in order.
    """
    total = shards.tokens - 1
    if max_tokens is not None:
        total = min(total, max_tokens)
    gathered: list[_Row] = []
    for begin in range(0, total, context):
        window = shards.window(begin, min(context, total - begin) + 1).astype(np.int64)
        document = int(shards.document_of(np.array([begin + 1]))[0])
        gathered.append(_Row(window[:-1], window[1:], document, begin + 1))
        if len(gathered) == batch:
            yield _padded(gathered)
            gathered = []
    if gathered:
        yield _padded(gathered)


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: IntArray
    targets: IntArray
    document: int
    position: int


def _document_rows(shards: TokenShards, context: int, stride: int, max_tokens: int | None) -> Iterator[_Row]:
    left = max_tokens if max_tokens is not None else shards.tokens
    prefix = [] if shards.begin_id is None else [shards.begin_id]
    for document in range(shards.documents):
        tokens = np.concatenate([np.array(prefix, dtype=np.int64), shards.document(document).astype(np.int64)])
        count = min(len(tokens) - 1, left)  # targets
        if left <= 0:
            return
        left -= max(count, 0)
        scored = 0
        while scored < count:
            end = min(count, context if scored == 0 else scored + stride)
            begin = max(0, end - context)
            targets = tokens[begin + 1 : end + 1].copy()
            targets[: scored - begin] = IGNORED
            place = int(shards.document_starts[document]) + scored + 1 - len(prefix)
            yield _Row(tokens[begin:end], targets, document, place)
            scored = end


def _sorted_stretches(found: Iterator[_Row], count: int) -> Iterator[_Row]:
    while stretch := list(islice(found, count)):
        yield from sorted(stretch, key=lambda row: -len(row.tokens))


def _padded(gathered: list[_Row]) -> ScoredBatch:
    width = max(len(row.tokens) for row in gathered)
    tokens = np.zeros((len(gathered), width), dtype=np.int64)
    targets = np.full((len(gathered), width), IGNORED, dtype=np.int64)
    for place, row in enumerate(gathered):
        tokens[place, : len(row.tokens)] = row.tokens
        targets[place, : len(row.targets)] = row.targets
    return ScoredBatch(
        tokens,
        targets,
        np.array([row.document for row in gathered], dtype=np.int64),
        np.array([row.position for row in gathered], dtype=np.int64),
    )


# --- segments of documents --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """`length` tokens of the split from `start` on, all of one document."""

    start: int
    length: int
    document: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One row: its parts (one, or A and B of a pair), each the tokens (n,) int64 and the word starts (n,) bool.

    Word starts are None where the shards have none; the first token of a span counts as one.
    """

    parts: tuple[tuple[IntArray, IntArray | None], ...]
    is_next: bool | None = None  # of a pair: whether B follows A


class Segments:
    """Spans of documents of up to `length` tokens, for objectives that see both sides (masked, denoise).

    A document longer than `length` is cut into spans of its own, at places that move from epoch to epoch; shorter
    ones are put together, whole, up to `length`. Every token is seen once per epoch. With `pairs` a row is BERT's
    pair: a span cut in two, the second half replaced by a stretch of another document in half of the rows
    (Devlin et al. 2019, next-sentence prediction); there short documents stand alone.
    """

    def __init__(self, shards: TokenShards, *, length: int, batch: int, seed: int, pairs: bool = False) -> None:
        """Raises DataError when the split is empty, or has no second document to make pairs from."""
        shortest = 8 if pairs else 1
        if length < shortest:
            raise RecipeError(
                f"train.context: leaves {length} tokens of text per row and at least {shortest} are needed; raise it"
            )
        sizes = np.diff(shards.document_starts)
        usable = np.flatnonzero(sizes >= (2 if pairs else 1))
        if not len(usable):
            raise DataError(
                f"{shards.folder}: the split holds no document to train on; look at data.sources, data.split"
            )
        if pairs and len(usable) < 2:
            raise DataError(
                f"{shards.folder}: next-sentence prediction needs at least 2 documents, and the split holds "
                f"{len(usable)}; set data.documents to cut the text into documents, or "
                "train.objective.next_sentence to false"
            )
        self.shards = shards
        self.length = length
        self.batch_size = batch
        self.seed = seed
        self.pairs = pairs
        self._long = usable[sizes[usable] > length]
        self._spans = -(-sizes[self._long] // length)  # per long document
        self._first_span = np.concatenate([[0], np.cumsum(self._spans)]).astype(np.int64)
        short = usable[sizes[usable] <= length]
        # Which short documents share a segment is drawn once: the number of segments must not change by epoch.
        self._short = short if pairs else short[_shuffled(len(short), seed, _PACKING, 0)]
        self._packs = _packed(sizes[self._short], 1 if pairs else length)
        self.segments_per_epoch = int(self._first_span[-1]) + len(self._packs) - 1
        self._epoch = -1
        self._order: IntArray = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every segment of an epoch has been seen (the last step may begin the next epoch)."""
        return -(-self.segments_per_epoch // self.batch_size)

    def batch(self, step: int) -> list[Segment]:
        """The rows of one step. Without pairs a row has one part, with pairs two."""
        rows = []
        for spans, is_next in self.spans(step):
            if self.pairs:
                rows.append(Segment(tuple(self._read([span]) for span in spans), is_next))
            else:
                rows.append(Segment((self._read(spans),)))
        return rows

    def spans(self, step: int) -> list[tuple[list[Span], bool | None]]:
        """Where the rows of one step come from: spans to be joined (with pairs: A and B), and whether B follows A."""
        found: list[tuple[list[Span], bool | None]] = []
        for count in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(count, self.segments_per_epoch)
            spans = self._segment(epoch, int(self._permutation(epoch)[place]))
            found.append(self._pair(spans[0], count) if self.pairs else (spans, None))
        return found

    def _read(self, spans: list[Span]) -> tuple[IntArray, IntArray | None]:
        tokens = np.concatenate([self.shards.window(span.start, span.length) for span in spans]).astype(np.int64)
        if self.shards.word_starts is None:
            return tokens, None
        flags = [self.shards.word_starts[span.start : span.start + span.length] for span in spans]
        starts = np.concatenate(flags)
        starts[np.cumsum([0, *(span.length for span in spans[:-1])])] = True
        return tokens, starts

    def _segment(self, epoch: int, index: int) -> list[Span]:
        """The spans of segment `index` in an epoch: one of a long document, or whole short ones."""
        starts = self.shards.document_starts
        if index >= self._first_span[-1]:
            pack = index - int(self._first_span[-1])
            members = self._short[self._packs[pack] : self._packs[pack + 1]]
            return [Span(int(starts[d]), int(starts[d + 1] - starts[d]), int(d)) for d in members]
        which = int(np.searchsorted(self._first_span, index, side="right")) - 1
        document = int(self._long[which])
        begin, end = int(starts[document]), int(starts[document + 1])
        number, count = index - int(self._first_span[which]), int(self._spans[which])
        # The first and the last span share what is left over, in proportions that change by epoch; all others
        # are full. `least` is what the first must take at least; staying off it keeps both of useful length.
        least = (end - begin) - (count - 1) * self.length
        margin = (self.length - least) // 4
        choices = self.length - least - 2 * margin + 1
        draw = int(_raw(self.seed, _CUTS, epoch, 1, document)[0])
        head = least + margin + draw % choices
        first = begin if number == 0 else begin + head + (number - 1) * self.length
        last = min(end, begin + head + number * self.length)
        return [Span(first, last - first, document)]

    def _pair(self, span: Span, count: int) -> tuple[list[Span], bool]:
        """Cut a span in two (where a word begins, if known); in half of the cases take the second from elsewhere."""
        draws = [int(number) for number in _raw(self.seed, _PAIRS, count, 4)]
        places = np.arange(1, span.length)
        if self.shards.word_starts is not None:
            flags = self.shards.word_starts[span.start + 1 : span.start + span.length]
            places = places[flags] if flags.any() else places
        middle = places[(places >= span.length // 4) & (places <= span.length - span.length // 4)]
        places = middle if len(middle) else places
        cut = int(places[draws[0] % len(places)])
        first = Span(span.start, cut, span.document)
        second = Span(span.start + cut, span.length - cut, span.document)
        if draws[1] % 2 == 0:
            return [first, second], True
        # Any token outside this document is as likely to be the place that the other stretch comes from.
        starts = self.shards.document_starts
        begin, end = int(starts[span.document]), int(starts[span.document + 1])
        place = draws[2] % (self.shards.tokens - (end - begin))
        place += (end - begin) * (place >= begin)
        other = int(self.shards.document_of(np.array([place]))[0])
        start = max(int(starts[other]), min(place, int(starts[other + 1]) - second.length))
        return [first, Span(start, min(second.length, int(starts[other + 1]) - start), other)], False

    def _permutation(self, epoch: int) -> IntArray:
        if epoch != self._epoch:
            self._order = _shuffled(self.segments_per_epoch, self.seed, _ORDER, epoch)
            self._epoch = epoch
        return self._order


def _packed(sizes: IntArray, length: int) -> IntArray:
    """Group consecutive documents up to `length` tokens (next fit): the first member of each group, and the end."""
    ends = np.cumsum(sizes)
    firsts = [0]
    while firsts[-1] < len(sizes):
        before = int(ends[firsts[-1] - 1]) if firsts[-1] else 0
        firsts.append(max(firsts[-1] + 1, int(np.searchsorted(ends, before + length, side="right"))))
    return np.array(firsts, dtype=np.int64)


def _raw(seed: int, purpose: int, number: int, count: int, *more: int) -> IntArray:
    """Random uint64 numbers. Raw output of the bit generator: numpy keeps that stable, its samplers it does not."""
    entropy: list[Any] = [seed, purpose, number, *more]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)


def _shuffled(count: int, seed: int, purpose: int, number: int) -> IntArray:
    return np.argsort(_raw(seed, purpose, number, count), kind="stable")
