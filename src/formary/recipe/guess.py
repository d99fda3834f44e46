"""From a look at some data to a commented recipe: task, column, documents, tokenizer, sizes, each with its reason.

Every guess is one small rule, a function from what was seen to a `Choice` (a value and why).
It opens no file (`formary init` takes the sample) and checks no promise: a guess is a start, to be edited.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from formary.errors import DataError, RecipeError, nearest

_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")
# Words as byte-level BPE separates them (Radford et al. 2019), without runs of white space.
_WORD = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’」』)）]*$")
# How chapters begin, likeliest first: the pattern goes into the recipe as data.documents.
_CHAPTERS = (
    "第[一二三四五六七八九十百千零〇两0-9]+[回章卷节節]",
    "[Cc][Hh][Aa][Pp][Tt][Ee][Rr] [0-9IVXLCivxlc]+",
    "# ",
)
_TEXT_NAMES = ("text", "content", "body", "document", "article", "passage", "story", "review", "sentence", "message")

# Text bytes up to which a byte-level BPE or WordPiece vocabulary of this size pays.
_VOCABULARIES = ((300_000, 1024), (3_000_000, 2048), (30_000_000, 4096), (300_000_000, 8192), (None, 16384))
# Training tokens up to which a model of this size pays, and how often it may read them before it learns them by heart.
_SIZES = ((100_000, "4x128", 16), (5_000_000, "6x256", 8), (50_000_000, "6x384", 3), (None, "8x512", 1))
_PRESETS = {"causal_lm": "gpt-mini", "masked_lm": "bert-mini", "denoise": "seq2seq-mini"}
_LEARNS = {
    "causal_lm": "learns to write on: every next token is predicted",
    "masked_lm": "learns to fill gaps, reading both ways",
    "denoise": "learns to restore removed spans, an encoder-decoder",
}
_SPECIAL_TOKENS = {"causal_lm": 1, "masked_lm": 5, "denoise": 103}
# Share of the weights that a token of the text meets: of an encoder-decoder most tokens meet the encoder only.
_COMPUTED = {"denoise": 0.5}
_BATCH = 16
_LONGEST = 1800.0  # seconds that a first run may take
REACHED = 0.7  # share of the measured matrix speed that training reaches
_HASH_DOCUMENTS = 100  # fewer documents than this may leave a hash split without any for validation or test


@dataclass(frozen=True)
class Sample:
    """What was looked at: some rows of the data, and how much of it they are."""

    sources: tuple[str, ...]  # as the recipe names them
    kind: str  # text, jsonl, csv, parquet or dataset
    files: int
    rows: Sequence[Mapping[str, Any]]  # of a text file one row, {"text": its beginning}
    share: float  # of the data that the rows are, 0 to 1
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Guess:
    """A recipe as commented YAML, what it rests on, and what a run of it will be."""

    recipe: str
    task: str
    saw: tuple[str, ...]  # sentences about the data
    parameters: int
    seconds: float  # of training, roughly
    before: tuple[tuple[str, str], ...] = ()  # (file name, recipe) of those whose models it starts from


class Choice(NamedTuple):
    """One guessed value and its reason."""

    value: Any
    why: str


@dataclass(frozen=True)
class _Seen:
    """The sample as documents, and what is counted in them once for all rules."""

    documents: list[str]
    share: float
    count: int  # documents in all the data, estimated
    bytes: int  # of UTF-8 text in all the data, estimated
    cjk: float  # share of the letters that are Chinese or Japanese characters
    characters: int  # distinct ones in the sample
    emails: int
    lengths: list[int] = field(default_factory=list)


def guess(
    sample: Sample, *, name: str, task: str | None = None, gflops: float = 50.0, chinese_words: bool = True
) -> Guess:
    """Guess a recipe for the data that `sample` was taken from.

    Args:
        sample: rows of the data, as `formary init` takes them.
        name: of the recipe and its run folder.
        task: causal_lm, masked_lm or denoise; guessed when left out.
        gflops: matrix speed of the machine in the precision of a run, for the estimate of time (1e9 operations / s).
        chinese_words: whether jieba is installed, which whole-word masking of Chinese needs.

    Raises:
        DataError: there is no text in the sample, or too little of it.
        RecipeError: a task without rules.
    """
    if task is not None and task not in _PRESETS:
        raise RecipeError(f"--task {task}: {nearest(task, _PRESETS)} tasks that can be guessed: {', '.join(_PRESETS)}")
    chosen = Choice(task, "as you asked") if task else _task()
    column = _column(sample)
    documents = _documents(sample)
    seen = look(_split(sample, column.value, documents.value), sample.share, files=sample.files, cut=documents.value)
    tokenizer = tokenizer_for(seen, chosen.value)
    vocab_size, tokens = token_counts(seen, tokenizer)
    split = _split_of(sample, seen, cut_anywhere=sample.files == 1 and documents.value == "file")
    training = max(1, int(tokens * (1 - split.validation - split.test)))
    context = _context(seen, tokens, training)
    size, passes = _size(training)
    parameters = parameter_estimate(chosen.value, size.value, vocab_size, context.value)
    computed = parameters * _COMPUTED.get(chosen.value, 1.0)
    steps, seconds = _steps(training, passes, context.value, computed, gflops)
    lines = Lines()
    lines.comment(f"{name}: written by `formary init` after a look at {percent(sample.share)} of the data.")
    lines.comment("Every value is a guess with its reason beside it. `formary run` executes it as it stands.")
    lines.add(0, "name", name, "names the run folder, runs/" + name)
    lines.add(0, "task", chosen.value, f"{_LEARNS[chosen.value]}; {chosen.why}")
    lines.section("data")
    _write_data(lines, sample, column, documents, seen, split, tokenizer, chosen.value, chinese_words)
    lines.section("model")
    lines.add(1, "preset", _PRESETS[chosen.value], f"about {parameters / 1e6:.1f} million parameters in all")
    lines.add(1, "size", *size)
    lines.section("train")
    lines.add(1, "steps", *steps)
    lines.add(1, "batch", _BATCH, "sequences per step")
    lines.add(1, "context", *context)
    _write_training(lines, chosen.value, steps.value, seen, chinese_words)
    if tokens * split.test > 1_000_000:
        lines.section("evaluate")
        lines.add(1, "max_tokens", 500_000, "of the test split, enough for narrow intervals")
    prompts = _prompts(seen, chosen.value)
    if prompts:
        lines.section("generate")
        lines.add(1, "prompts", prompts, "samples in the report start from these; taken from your data")
    saw = tuple(_sentences(sample, column, documents, seen, tokens))
    return Guess(lines.text(), chosen.value, saw, parameters, seconds)


# The rules, in the order in which they are applied --------------------------------------------------------------------


def _task() -> Choice:
    """Text by itself is for pretraining. Rules for rows with labels, pairs, messages go before this answer."""
    return Choice("causal_lm", "others for plain text: masked_lm, denoise")


def _column(sample: Sample) -> Choice:
    """The column that holds text: one called text, else by a usual name, else the one with the longest text."""
    if sample.kind == "text":
        return Choice("text", "")
    found = {name: length for name in names_of(sample.rows) if (length := text_length(sample.rows, name))}
    if "text" in found:
        return Choice("text", "")
    if not found:
        raise DataError(
            f"{', '.join(sample.sources)}: no column holds text (columns: {', '.join(names_of(sample.rows)) or 'none'}); "
            "text is a string of several words. Write it into a column `text`, or map one with data.columns.text"
        )
    usual = [name for wanted in _TEXT_NAMES for name in found if name.lower() == wanted]
    name = usual[0] if usual else max(found, key=found.__getitem__)
    others = [other for other in found if other != name]
    return Choice(name, "the column read as text" + (f"; {', '.join(others)} would do too" if others else ""))


def _documents(sample: Sample) -> Choice:
    """How a plain text becomes documents: by chapters, by paragraphs or lines that stand alone, else by file."""
    if sample.kind != "text":
        return Choice("row", "")
    texts = [row["text"] for row in sample.rows]
    joined = "\n".join(texts)
    if sample.files >= _HASH_DOCUMENTS:
        return Choice("file", f"{sample.files:,} files, a document each")
    for pattern in _CHAPTERS:
        pieces = _pieces(joined, pattern)
        if len(pieces) / sample.share >= 20 and max(map(len, pieces)) < 0.2 * len(joined):
            return Choice(
                pattern, f"a chapter is a document: about {rounded(len(pieces) / sample.share)} begin like this"
            )
    lines = [line for line in joined.split("\n") if line.strip()]
    paragraphs = _pieces(joined, "paragraph")
    chinese = cjk_share(joined) > 0.3
    if chinese and len(paragraphs) / sample.share >= _HASH_DOCUMENTS:
        # Chinese prose puts no blank lines between its paragraphs, so these are texts of their own.
        return Choice("paragraph", f"blank lines separate about {rounded(len(paragraphs) / sample.share)} texts")
    ended = sum(bool(_SENTENCE_END.search(line.strip())) for line in lines)
    alone = len(lines) == len(paragraphs) or (len(paragraphs) < 0.01 * len(lines) and ended > 0.6 * len(lines))
    if alone and len(lines) / sample.share >= _HASH_DOCUMENTS:
        return Choice("line", f"about {rounded(len(lines) / sample.share)} lines that stand alone")
    return Choice("file", "one running text" if sample.files == 1 else f"{sample.files} running texts")


def tokenizer_for(seen: _Seen, task: str) -> Choice:
    """Kind and vocabulary size, small enough that the text surely allows it: {"kind": ..., "vocab_size": ...}."""
    if seen.cjk > 0.3 and (seen.bytes < 100_000_000 or task == "masked_lm"):
        return Choice(
            {"kind": "characters"}, f"{percent(seen.cjk)} of the letters are Chinese or Japanese: each is a token"
        )
    if seen.bytes < 60_000:
        if seen.characters > 400:
            return Choice({"kind": "bytes"}, "too little text to learn words from")
        return Choice({"kind": "characters"}, "too little text to learn words from: each character is a token")
    kind = "wordpiece" if task == "masked_lm" else "bpe"
    wanted = next(size for limit, size in _VOCABULARIES if limit is None or seen.bytes < limit)
    allowed = _allowed_vocabulary(seen, task)
    vocab_size = wanted if wanted <= allowed else allowed // 128 * 128
    if vocab_size < 512:
        kind = "characters" if seen.characters <= 400 else "bytes"
        return Choice({"kind": kind}, "the text repeats itself too much to learn many words from")
    settings: dict[str, Any] = {"kind": kind, "vocab_size": vocab_size}
    if kind == "wordpiece":
        settings["lowercase"] = True
    why = f"for {megabytes(seen.bytes)} of text" if vocab_size == wanted else "as many as the text surely allows"
    return Choice(settings, why)


def _allowed_vocabulary(seen: _Seen, task: str) -> int:
    """A vocabulary size that training a BPE or WordPiece certainly reaches on this text.

    Merging goes on until no pair of symbols occurs twice, so every word that occurs twice ends as one token. Words of
    the sample seen three times are counted, less a tenth: validation, test and duplicates leave the training text.
    """
    lower = task == "masked_lm"
    counts: Counter[str] = Counter()
    for document in set(seen.documents):
        counts.update(
            word.strip() if lower else word for word in _WORD.findall(document.lower() if lower else document)
        )
    words = sum(1 for word, count in counts.items() if count >= 3 and len(word) > 1)
    alphabet = 0 if lower else 256
    return int(alphabet + _SPECIAL_TOKENS[task] + 0.9 * words)


def token_counts(seen: _Seen, tokenizer: Choice) -> tuple[int, int]:
    """(vocabulary size, tokens in all the data), estimated."""
    kind, vocab_size = tokenizer.value["kind"], tokenizer.value.get("vocab_size")
    if kind == "bytes":
        return 260, seen.bytes
    if kind == "characters":
        bytes_each = sum(len(text.encode("utf-8", "replace")) for text in seen.documents) / max(1, sum(seen.lengths))
        return seen.characters + 10, int(seen.bytes / bytes_each)
    return vocab_size, int(seen.bytes / _bytes_a_token(vocab_size))


def _bytes_a_token(vocab_size: int) -> float:
    """Measured on English with byte-level BPE: 2.4 bytes a token at 512, and 0.4 more with each doubling."""
    return 2.4 + 0.4 * max(0, (vocab_size // 512).bit_length() - 1)


def _split_of(sample: Sample, seen: _Seen, *, cut_anywhere: bool) -> _Split:
    """Shares for validation and test; by hash where there are enough documents, else in order."""
    share = 0.05 if seen.bytes > 1_000_000 else 0.1
    shares = {part: 0.0 if getattr(sample, part) else share for part in ("validation", "test")}
    if cut_anywhere:
        return _Split("order", "one text is cut in its own order, the end is held back", **shares)
    if seen.count >= _HASH_DOCUMENTS:
        return _Split("hash", "a document stays in its split when data is added", **shares)
    # Each part gets at least one document: with three, one each; with two, none is left for validation.
    least = {1: 0.0, 2: 0.5, 3: 0.25}.get(seen.count, max(share, round(1 / seen.count + 0.005, 2)))
    shares = {part: least if value else 0.0 for part, value in shares.items()}
    if seen.count == 2:
        shares["validation"] = 0.0
    why = f"{seen.count} documents are too few to split by hash"
    return _Split("order", why, **shares)


@dataclass(frozen=True)
class _Split:
    by: str
    why: str
    validation: float
    test: float


def _context(seen: _Seen, tokens: int, training: int) -> Choice:
    """Tokens per sequence: 256, less for short documents, and never so much that there are only a few sequences."""
    longest = max(16, 1 << max(0, (training // 32).bit_length() - 1))
    if longest < 256:
        return Choice(longest, f"short, as there are only about {rounded(training)} tokens to learn from")
    typical = median(seen.lengths) * tokens / max(1, sum(seen.lengths) / seen.share)
    if typical < 48:
        return Choice(
            128, f"tokens per sequence; a typical document has {max(1, round(typical))}, several are packed together"
        )
    return Choice(256, "tokens per sequence; longer sees further back and costs more")


def _size(training: int) -> tuple[Choice, float]:
    """The model's size for this many training tokens, and how many passes over them are worth it."""
    size, passes = next((size, passes) for limit, size, passes in _SIZES if limit is None or training < limit)
    return Choice(size, f"layers x width, for about {rounded(training)} training tokens"), passes


def parameter_estimate(task: str, size: str, vocab_size: int, context: int) -> int:
    """Weights of the task's preset at this size, to a few percent: norms and biases are not counted."""
    layers, width = (int(number) for number in size.split("x"))
    gated = 3 * width * (-(-8 * width // 3 // 32) * 32)
    if task == "masked_lm":
        return layers * 12 * width**2 + (vocab_size + context + width) * width
    if task == "denoise":
        return layers * (12 * width**2 + 2 * gated) + 2 * vocab_size * width
    return layers * (4 * width**2 + gated) + vocab_size * width


def _steps(training: int, passes: float, context: int, parameters: float, gflops: float) -> tuple[Choice, float]:
    """Steps for so many passes, or as many as half an hour allows; and the seconds they take, roughly.

    A step computes 6 operations per parameter and token (Kaplan et al. 2020, section 2.1).
    """
    per_step = _BATCH * context
    seconds_per_step = 6 * parameters * per_step / (gflops * 1e9 * REACHED)
    wanted = max(200, round(training * passes / per_step))
    allowed = max(200, int(_LONGEST / seconds_per_step))
    if wanted <= allowed:
        steps = _round_steps(wanted)
        seconds = steps * seconds_per_step
        seen = steps * per_step / training
        return Choice(steps, f"{_passes(seen)} over the training text; roughly {duration(seconds)} here"), seconds
    steps = _round_steps(allowed)
    seconds, full = steps * seconds_per_step, wanted * seconds_per_step
    why = f"roughly {duration(seconds)} here; {_round_steps(wanted)} ({duration(full)}) would make more of this text"
    return Choice(steps, why), seconds


def _prompts(seen: _Seen, task: str) -> list[str]:
    """What the samples start from: how some documents begin, or with a gap to fill."""
    wanted: list[str] = []
    step = max(1, len(seen.documents) // 3)
    for document in seen.documents[::step][:3]:
        lines = (line.strip() for line in document.splitlines())
        line = next((line for line in lines if len(line) >= (8 if seen.cjk > 0.3 else 25)), None)
        if line is None:
            continue
        units = list(line[:24]) if seen.cjk > 0.3 else line.split()[:12]
        glue = "" if seen.cjk > 0.3 else " "
        if task == "causal_lm":
            wanted.append(glue.join(units[: max(4, len(units) // 2)]))
        else:
            units[len(units) // 2] = "[MASK]" if task == "masked_lm" else "<extra_id_0>"
            wanted.append(glue.join(units))
    return list(dict.fromkeys(wanted))


# Writing --------------------------------------------------------------------------------------------------------------


def _write_data(
    lines: Lines,
    sample: Sample,
    column: Choice,
    documents: Choice,
    seen: _Seen,
    split: _Split,
    tokenizer: Choice,
    task: str,
    chinese_words: bool,
) -> None:
    lines.add(
        1,
        "sources",
        list(sample.sources),
        f"{files_of(sample)}, about {megabytes(seen.bytes)} of text",
    )
    for part in ("validation", "test"):
        if getattr(sample, part):
            lines.add(1, part, list(getattr(sample, part)), "lies beside it under a name that says so")
    if column.value != "text":
        lines.add(1, "columns", {"text": column.value}, column.why)
    if sample.kind == "text":
        lines.add(1, "documents", documents.value, documents.why)
    if sample.encoding != "utf-8":
        lines.add(1, "encoding", sample.encoding, "the file is not UTF-8")
    if seen.emails or (seen.count >= _HASH_DOCUMENTS and median(seen.lengths) >= 200 and seen.bytes < 200_000_000):
        lines.section("clean", 1)
        if seen.emails:
            lines.add(2, "pii", "mask", "e-mail addresses were seen; a model repeats what it reads (keep, mask, drop)")
        if seen.count >= _HASH_DOCUMENTS and median(seen.lengths) >= 200 and seen.bytes < 200_000_000:
            lines.add(2, "near_duplicates", 0.8, "near-copies would make the test look easy")
    if split.validation or split.test:
        lines.section("split", 1)
        lines.add(2, "by", split.by, split.why)
        for part in ("validation", "test"):
            if not getattr(sample, part):
                lines.add(
                    2,
                    part,
                    getattr(split, part),
                    f"share of the {'text' if sample.files == 1 and documents.value == 'file' else 'documents'} for {part}",
                )
    lines.section("tokenizer", 1)
    for place, (setting, value) in enumerate(tokenizer.value.items()):
        lines.add(2, setting, value, "" if place else tokenizer.why)
    if task == "masked_lm":
        lines.add(1, "words", *_words(seen, chinese_words))


def _words(seen: _Seen, chinese_words: bool) -> Choice:
    """Where words begin, for whole-word masking."""
    if seen.cjk <= 0.3:
        return Choice("tokenizer", "marks where words begin, for masking whole words")
    if chinese_words:
        return Choice("jieba", "finds the Chinese words, for masking whole words")
    return Choice("none", 'jieba finds Chinese words for whole-word masking: pip install "formary[zh]"')


def _write_training(lines: Lines, task: str, steps: int, seen: _Seen, chinese_words: bool) -> None:
    if task == "causal_lm":
        lines.section("optimiser", 1)
        lines.add(2, "name", "muon", "hidden matrices by Muon, the rest by AdamW")
        lines.add(2, "lr", 0.003, "peak rate of AdamW's part")
        lines.section("schedule", 1)
        lines.add(2, "name", "wsd", "warm-up, stable, decay")
        lines.add(2, "decay", 0.5, "share of the run that decays")
        lines.add(2, "final", 0.0, "to nothing")
    if task == "masked_lm" and _words(seen, chinese_words).value != "none":
        lines.section("objective", 1)
        lines.add(2, "whole_words", True, "mask whole words, which is harder and teaches more")
    every = max(20, _round_steps(steps // 10))
    lines.add(1, "validate_every", every, "steps; the best model is kept")
    lines.add(1, "save_every", max(100, every * 2), "steps; a stopped run goes on from here")
    if task == "causal_lm":
        lines.add(1, "sample_every", every * 2, "steps; watch it learn to write")


class Lines:
    """YAML lines with their comments in one column, or above where a line is long."""

    _COLUMN, _WIDTH = 36, 120

    def __init__(self) -> None:
        self._lines: list[str] = []

    def comment(self, text: str) -> None:
        self._lines.append(f"# {text}")

    def section(self, name: str, depth: int = 0) -> None:
        self._lines.append("  " * depth + name + ":")

    def add(self, depth: int, key: str, value: Any, why: str = "") -> None:
        indent = "  " * depth
        line = f"{indent}{key}: {_yaml(value)}"
        why = " ".join(why.split())
        if not why:
            self._lines.append(line)
        elif max(len(line), self._COLUMN) + len(why) + 4 <= self._WIDTH:
            self._lines.append(f"{line:<{self._COLUMN}}  # {why}")
        else:
            self._lines += [f"{indent}# {why}", line]

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _yaml(value: Any) -> str:
    """A value on one line: JSON is YAML, and plain words need no quotes."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


_PLAIN = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*|\d+x\d+")
_YAML_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


def _sentences(sample: Sample, column: Choice, documents: Choice, seen: _Seen, tokens: int) -> Iterator[str]:
    looked = "all of it was looked at" if sample.share > 0.999 else f"{percent(sample.share)} of it was looked at"
    yield f"{files_of(sample)}, about {megabytes(seen.bytes)} of text; {looked}"
    if sample.kind != "text":
        others = [describe(sample.rows, name) for name in names_of(sample.rows) if name != column.value]
        yield f"text is in column {column.value}" + (f"; beside it {', '.join(others)}" if others else "")
    else:
        yield f"documents: {documents.value} ({documents.why})"
    count = f"{rounded(seen.count)} documents" if seen.count != 1 else "1 document"
    about = "" if sample.share > 0.999 else "about "
    typical = f"{rounded(median(seen.lengths))} characters" + (" in a typical one" if seen.count != 1 else "")
    yield f"{about}{count}, {typical}, about {rounded(tokens)} tokens"
    if seen.cjk > 0.02:
        yield f"{percent(seen.cjk)} of the letters are Chinese or Japanese"
    if sample.encoding != "utf-8":
        yield f"encoding {sample.encoding}"
    for part in ("validation", "test"):
        if getattr(sample, part):
            yield f"for {part}: {', '.join(getattr(sample, part))}"


def files_of(sample: Sample) -> str:
    kind = "dataset folder" if sample.kind == "dataset" else f"{sample.kind} file"
    return f"{sample.files:,} {kind}" + ("s" if sample.files != 1 else "")


# Looking --------------------------------------------------------------------------------------------------------------


def _split(sample: Sample, column: str, documents: str) -> list[str]:
    texts = [row.get(column) or "" for row in sample.rows]
    if sample.kind == "text":
        texts = [piece for text in texts for piece in _pieces(text, documents)]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _pieces(text: str, documents: str) -> list[str]:
    """A text as data.documents would cut it."""
    if documents == "file":
        return [text]
    if documents == "line":
        cut = text.split("\n")
    elif documents == "paragraph":
        cut = re.split(r"\n(?:[ \t]*\n)+", text)
    else:
        cut = re.split(f"^(?={documents})", text, flags=re.MULTILINE)
    return [piece for piece in cut if piece.strip()]


def look(documents: list[str], share: float, *, files: int, cut: str) -> _Seen:
    lengths = [len(text) for text in documents]
    if sum(lengths) / share < 500:
        raise DataError(f"the data holds about {round(sum(lengths) / share)} characters of text, too few to learn from")
    total = sum(len(text.encode("utf-8", "replace")) for text in documents)
    joined = "\n".join(documents)
    return _Seen(
        documents=documents,
        share=share,
        count=files if cut == "file" else max(1, round(len(documents) / share)),
        bytes=round(total / share),
        cjk=cjk_share(joined),
        characters=len(set(joined)),
        emails=len(_EMAIL.findall(joined)) if "@" in joined else 0,
        lengths=lengths,
    )


def cjk_share(text: str) -> float:
    letters = len(_LETTER.findall(text))
    return len(_CJK.findall(text)) / letters if letters else 0.0


def names_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def text_length(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean length of a column that holds text (several words, mostly different in each row); 0 for others."""
    values = [row.get(name) for row in rows]
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if len(texts) < 0.5 * len(values) or len(set(texts)) < 0.5 * len(texts):
        return 0.0
    # Dates and numbers with a space in them are no text.
    worded = sum(
        (" " in text.strip() or bool(_CJK.search(text))) and len(_LETTER.findall(text)) > 0.4 * len(text)
        for text in texts
    )
    return sum(map(len, texts)) / len(texts) if worded >= 0.5 * len(texts) else 0.0


def describe(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A column by name, with its values where there are only a few."""
    values = {str(row.get(name)) for row in rows}
    if len(values) == 1 < len(rows):
        return f"{name} (always {values.pop():.20}: nothing to tell apart)"
    if len(values) <= min(5, len(rows) // 2) and all(len(value) <= 20 for value in values):
        return f"{name} ({', '.join(sorted(values))})"
    return f"{name} ({len(values):,} values)" if len(values) <= min(100, len(rows) // 10) else name


# Numbers as words -----------------------------------------------------------------------------------------------------


def rounded(number: float) -> str:
    """Two leading digits: 1234 as 1,200, 1234567 as 1.2 million."""
    if number >= 1e6:
        return f"{number / 1e6:,.1f} million"
    digits = max(0, len(str(round(number))) - 2)
    return f"{round(number / 10**digits) * 10**digits:,}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{max(1, round(count / 1e3)):,} kB"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1 %"


def _passes(number: float) -> str:
    return f"{number:.0f} passes" if number >= 1.5 else f"{number:.1f} of a pass" if number < 0.95 else "one pass"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _round_steps(steps: float) -> int:
    """Two leading digits, the second even more round where it can be: 1234 as 1200, 87 as 90."""
    unit = 10 ** max(1, len(str(round(steps))) - 2)
    return max(10, round(steps / unit) * unit)
