"""Token shards: a split of documents as one memory-mapped array of ids, with the documents' boundaries and bytes.

The one idea: written once as a stream (constant memory, whole or not at all), then only ever mapped and sliced.
It does not choose what a model sees at a step (batches) and knows nothing of how text was cleaned.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import xxhash

from formary import durable
from formary.data.tokenizer import IntArray, Tokenizer, is_cjk
from formary.errors import DataError, MissingExtra

Words = Literal["tokenizer", "jieba", "none"]

_FORMAT = 1
_BATCH_CHARS = 1_000_000  # encoded at once; three such batches are in flight
_PIECE_CHARS = 250_000  # longer documents are cut, where that changes no token
_IN_FLIGHT = 3


def write_tokens(
    documents: Path,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    words: Words = "none",
    end_of_document: bool | None = None,
    column: str = "text",
    progress: Callable[[int], None] | None = None,
    stretch: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Encode `column` of every row of a JSONL file into `folder`, and return its meta.json.

    `end_of_document` closes each document with the tokenizer's eos (or else sep) token, as causal models need; left
    open, that is done for a tokenizer with eos and without mask or sentinel tokens.
    `words` marks the tokens at which a word begins. `progress` is called with the UTF-8 bytes done so far.
    `stretch` are the bytes of the file to encode, from the beginning of a line to the end of one; all, where left out.
    Rows whose text is empty are left out. Memory does not grow with the file, only with its longest row.

    Raises:
        DataError: the file is missing, or a row is not JSON or lacks the column (file and line named).
        MissingExtra: words is jieba and jieba is not installed.
        StorageError: the disk is full; nothing half-written is left.
    """
    mark = _word_marker(tokenizer, words)
    end_id = None
    if end_of_document is None:
        end_of_document = tokenizer.eos_id is not None and tokenizer.mask_id is None and not tokenizer.sentinel_ids
    if end_of_document:
        end_id = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.sep_id
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    end = None if end_id is None else np.array([end_id], dtype=np.uint32)

    with durable.new_folder(folder) as temporary, _Files(temporary, words != "none") as files:
        begin = np.zeros(1, dtype="<i8")
        files.write("starts", begin)
        done = 0
        for batch in _encoded(documents, column, tokenizer, mark, stretch, with_offsets=words == "jieba"):
            parts: list[IntArray] = []
            flags: list[IntArray] = []
            lengths: list[int] = []
            sizes: list[int] = []
            for piece, ids, starts in batch:
                if piece.first:
                    lengths.append(0)
                    sizes.append(0)
                elif not lengths:  # goes on with the document that the last batch left open
                    lengths.append(files.open_length)
                    sizes.append(files.open_bytes)
                closing = [end] if piece.last and end is not None else []
                parts += [ids, *closing]
                if starts is not None:
                    flags += [starts, *([np.ones(1, dtype=np.bool_)] * len(closing))]
                lengths[-1] += len(ids) + len(closing)
                sizes[-1] += piece.bytes
                done += piece.bytes
            if not parts:
                continue
            files.write("tokens", np.concatenate(parts).astype(dtype))
            if flags:
                files.write("word_starts", np.concatenate(flags).astype(np.uint8))
            files.open_length = files.open_bytes = 0
            if not batch[-1][0].last:
                files.open_length, files.open_bytes = lengths.pop(), sizes.pop()
            ends = begin[-1] + np.cumsum(np.array(lengths, dtype="<i8"))
            if len(ends):
                files.write("starts", ends)
                files.write("bytes", np.array(sizes, dtype="<i8"))
                begin = ends
            if progress is not None:
                progress(done)
        meta = {
            "format": _FORMAT,
            "dtype": dtype.str,
            "tokens": int(begin[-1]),
            "documents": files.items("bytes", 8),
            "bytes": done,
            "vocab_size": tokenizer.vocab_size,
            "end_id": end_id,
            "begin_id": end_id if end_id is not None else tokenizer.bos_id,
            "words": words,
            "tokenizer": xxhash.xxh3_128_hexdigest(tokenizer.backend.to_str().encode()),
            "files": files.summary(),
        }
        files.close()
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


@dataclass(frozen=True)
class TokenShards:
    """One split, memory-mapped. Document i is tokens[document_starts[i]:document_starts[i + 1]].

    Token arrays are views of the map in its own type (uint16 or uint32); copy them before long use.
    """

    folder: Path
    meta: dict[str, Any]
    array: IntArray  # (tokens,) uint16 or uint32
    document_starts: IntArray  # (documents + 1,) int64
    document_bytes: IntArray  # (documents,) int64, UTF-8 bytes of the text
    word_starts: IntArray | None  # (tokens,) bool

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> TokenShards:
        """Map the shards in `folder`; `verify` also reads all of it and compares checksums.

        Raises:
            DataError: the folder is incomplete or damaged.
        """
        folder = Path(folder)
        again = "prepare the data again"
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            files = dict(meta["files"])
            if meta["format"] != _FORMAT:
                raise DataError(f"{folder}: token shards of format {meta['format']}, not {_FORMAT}; {again}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: holds no token shards (meta.json: {error}); {again}") from error
        for name, expected in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise DataError(f"{path}: is missing or cut short; {again}")
            if verify and _checksum(path) != expected["xxh3"]:
                raise DataError(f"{path}: does not match its checksum; {again}")
        return cls(
            folder,
            meta,
            _map(folder / "tokens.bin", np.dtype(meta["dtype"])),
            _map(folder / "starts.bin", np.dtype("<i8")),
            _map(folder / "bytes.bin", np.dtype("<i8")),
            _map(folder / "word_starts.bin", np.dtype(np.bool_)) if "word_starts.bin" in files else None,
        )

    @property
    def tokens(self) -> int:
        """How many tokens there are, ends of documents included."""
        return len(self.array)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.document_bytes)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer that wrote them."""
        return int(self.meta["vocab_size"])

    @property
    def begin_id(self) -> int | None:
        """The token that stands before a document: the end of the one before it, or the tokenizer's bos."""
        number = self.meta["begin_id"]
        return None if number is None else int(number)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that one token stands for, on average."""
        return float(self.document_bytes.sum()) / max(self.tokens, 1)

    def window(self, start: int, length: int) -> IntArray:
        """Tokens start .. start + length, whatever documents they belong to: (length,)."""
        return self.array[start : start + length]

    def document(self, index: int) -> IntArray:
        """The tokens of one document, its end token included."""
        return self.array[self.document_starts[index] : self.document_starts[index + 1]]

    def document_of(self, positions: IntArray) -> IntArray:
        """The index of the document that each token position lies in, int64 of the same shape."""
        return np.searchsorted(self.document_starts, positions, side="right").astype(np.int64) - 1


# --- reading and encoding ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """A document, or a stretch of one that is too long to encode at once."""

    text: str
    bytes: int
    first: bool
    last: bool


_Marker = Callable[[str, IntArray, IntArray | None], IntArray]
_Encoded = list[tuple[_Piece, IntArray, IntArray | None]]


def _encoded(
    documents: Path,
    column: str,
    tokenizer: Tokenizer,
    mark: _Marker | None,
    stretch: tuple[int, int] | None,
    *,
    with_offsets: bool,
) -> Iterator[_Encoded]:
    """Batches of encoded pieces, in order.

    Two batches are worked on at a time: the library encodes one on its own threads, without the interpreter
    lock, while the ids of the other become arrays.
    """

    def work(batch: list[_Piece]) -> _Encoded:
        texts = [piece.text for piece in batch]
        if with_offsets:
            both = tokenizer.encode_with_offsets(texts)
        else:
            both = [(ids, None) for ids in tokenizer.encode_batch(texts)]  # type: ignore[misc]
        return [
            (piece, ids, None if mark is None else mark(piece.text, ids, offsets))
            for piece, (ids, offsets) in zip(batch, both, strict=True)
        ]

    waiting: deque[Future[_Encoded]] = deque()
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode") as pool:
        try:
            for batch in _batches(_pieces(documents, column, tokenizer, stretch)):
                waiting.append(pool.submit(work, batch))
                if len(waiting) >= _IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    limit = max(_BATCH_CHARS, _BATCH_CHARS // 4 * (os.cpu_count() or 1))
    batch: list[_Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= limit:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _pieces(documents: Path, column: str, tokenizer: Tokenizer, stretch: tuple[int, int] | None) -> Iterator[_Piece]:
    for text in read_texts(documents, column, stretch=stretch):
        if len(text) <= _PIECE_CHARS:
            yield _Piece(text, _utf8_length(text), True, True)
            continue
        first = True
        before: str | None = None
        for part in tokenizer.pieces(text, _PIECE_CHARS):
            if before is not None:
                yield _Piece(before, _utf8_length(before), first, False)
                first = False
            before = part
        assert before is not None
        yield _Piece(before, _utf8_length(before), first, True)


def read_texts(documents: Path, column: str = "text", *, stretch: tuple[int, int] | None = None) -> Iterator[str]:
    """The texts of a JSONL file, one after the other, empty ones left out; what UTF-8 cannot hold is U+FFFD.

    Args:
        stretch: the bytes to read, of whole lines; in errors lines count from there.

    Raises:
        DataError: a row is not JSON or lacks the column (file and line named).
    """
    documents = Path(documents)
    try:
        stream = documents.open("rb", buffering=1 << 20)
    except OSError as error:
        raise DataError(f"{documents}: cannot be read ({error.strerror}); prepare the data again") from error
    with stream:
        begin, end = stretch or (0, None)
        stream.seek(begin)
        place = begin
        for number, line in enumerate(stream, start=1):
            if end is not None and place >= end:
                return
            place += len(line)
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{documents} line {number}: is not JSON ({error})") from error
            text = row.get(column) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{documents} line {number}: has no text in column '{column}'")
            if not text:
                continue
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:  # half of a surrogate pair, as "\\ud800" in JSON
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


# --- where words begin ------------------------------------------------------------------------------------------


def _word_marker(tokenizer: Tokenizer, words: Words) -> _Marker | None:
    if words == "none":
        return None
    if words == "jieba":
        return _jieba_marker()
    return _token_marker(tokenizer)


_SPACE, _WORD, _CJK, _OTHER, _UNKNOWN = range(5)


def _token_marker(tokenizer: Tokenizer) -> _Marker:
    """Word starts from what the tokens themselves are, by look-up.

    WordPiece says it itself (no "##"). Elsewhere a token begins a word if it begins with a space, follows one, is
    of another kind of character than the token before (letters and digits; others), or begins with a Chinese,
    Japanese or Korean character: each of these is a word of its own.
    """
    surfaces = tokenizer.token_bytes
    if tokenizer.backend.model.__class__.__name__ == "WordPiece":
        prefix = tokenizer.backend.model.continuing_subword_prefix
        begins = np.ones(len(surfaces), dtype=np.bool_)
        begins[[number for name, number in tokenizer.vocab.items() if name.startswith(prefix)]] = False
        return lambda text, ids, offsets: np.asarray(begins[ids])

    first = np.array([_kind_of_start(surface) for surface in surfaces], dtype=np.uint8)
    last = np.array([_kind_of_end(surface) for surface in surfaces], dtype=np.uint8)
    special = np.zeros(len(surfaces), dtype=np.bool_)
    special[list(tokenizer.special_ids)] = True

    def mark(text: str, ids: IntArray, offsets: IntArray | None) -> IntArray:
        if not len(ids):
            return np.zeros(0, dtype=np.bool_)
        ends = last[ids]
        # A token of inner bytes only does not know its character: take the kind of the token that began it.
        known = np.maximum.accumulate(np.where(ends != _UNKNOWN, np.arange(len(ids)), 0))
        before = ends[known][:-1]
        here = first[ids][1:]
        starts = np.ones(len(ids), dtype=np.bool_)
        starts[1:] = (here != _UNKNOWN) & ((here != before) | (here == _SPACE) | (here == _CJK))
        return starts | special[ids]

    return mark


def _kind(character: str) -> int:
    if character.isspace():
        return _SPACE
    if is_cjk(ord(character)):
        return _CJK
    return _WORD if character.isalnum() else _OTHER


def _kind_of_start(surface: bytes) -> int:
    if not surface:
        return _OTHER
    if 0x80 <= surface[0] < 0xC0:
        return _UNKNOWN  # goes on with a character that began earlier
    return _kind_of_lead(surface) or _kind(surface.decode("utf-8", "ignore")[:1] or "?")


def _kind_of_end(surface: bytes) -> int:
    lead = len(surface) - 1
    while lead >= 0 and 0x80 <= surface[lead] < 0xC0:
        lead -= 1
    if lead < 0:
        return _UNKNOWN if surface else _OTHER
    tail = surface[lead:]
    return _kind_of_lead(tail) or _kind(tail.decode("utf-8", "ignore")[:1] or "?")


def _kind_of_lead(surface: bytes) -> int:
    """The kind of a character cut short, from its first byte; 0 where it is whole."""
    whole = 1 if surface[0] < 0x80 else 2 if surface[0] < 0xE0 else 3 if surface[0] < 0xF0 else 4
    if len(surface) >= whole:
        return 0
    if whole == 3 and 0xE3 <= surface[0] <= 0xE9:
        return _CJK
    return _WORD if whole < 4 else _OTHER


def _jieba_marker() -> _Marker:
    """Word starts from jieba's segmentation of the text, carried to tokens through their character spans."""
    try:
        import jieba
    except ImportError as error:
        raise MissingExtra("zh", "data.words: jieba") from error
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()

    def mark(text: str, ids: IntArray, offsets: IntArray | None) -> IntArray:
        assert offsets is not None
        if not len(ids):
            return np.zeros(0, dtype=np.bool_)
        lengths = np.array([len(word) for word in jieba.cut(text)], dtype=np.int64)
        begins = np.zeros(len(text) + 1, dtype=np.int64)
        begins[np.cumsum(lengths)[:-1]] = 1
        begins[0] = 1
        begun = np.concatenate([[0], np.cumsum(begins)])  # words begun before each character
        # A token starts a word if one begins inside its span; a second token of the same character does not.
        # Spaces left out of the spans (WordPiece) begin nothing that the next token does not begin too.
        spans = np.minimum(offsets, len(text))
        starts = begun[np.maximum(spans[:, 1], spans[:, 0] + 1)] > begun[spans[:, 0]]
        starts[1:] &= spans[1:, 0] != spans[:-1, 0]
        starts[0] = True
        return np.asarray(starts)

    return mark


# --- files ------------------------------------------------------------------------------------------------------


class _Files:
    """The arrays being written, each with a running checksum."""

    def __init__(self, folder: Path, with_words: bool) -> None:
        names = ["tokens", "starts", "bytes", *(["word_starts"] if with_words else [])]
        self._streams = {name: (folder / f"{name}.bin").open("wb", buffering=1 << 20) for name in names}
        self._sums = {name: xxhash.xxh3_128() for name in names}
        self._bytes = dict.fromkeys(names, 0)
        self.open_length = 0  # tokens and bytes of the document that the last batch left unfinished
        self.open_bytes = 0

    def write(self, name: str, array: IntArray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self._streams[name].write(data)
        self._sums[name].update(data)
        self._bytes[name] += len(data)

    def items(self, name: str, size: int) -> int:
        return self._bytes[name] // size

    def summary(self) -> dict[str, dict[str, Any]]:
        return {
            f"{name}.bin": {"bytes": self._bytes[name], "xxh3": self._sums[name].hexdigest()} for name in self._sums
        }

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def __enter__(self) -> _Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map(path: Path, dtype: np.dtype[Any]) -> IntArray:
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _checksum(path: Path) -> str:
    total = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return str(total.hexdigest())
