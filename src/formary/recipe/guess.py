"""From a look at some data to a commented recipe: task, column, documents, tokenizer, sizes, each with its reason.

Every guess is one small rule, a function from what was seen to a `Choice` (a value and why).
It opens no file (`formary init` takes the sample) and checks no promise: a guess is a start, to be edited.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from formary.errors import DataError, RecipeError, nearest
from formary.recipe.commented import Choice, Lines, megabytes, percent, round_steps, rounded
from formary.recipe.sample import (
    Sample,
    Seen,
    cjk_share,
    describe,
    files_of,
    look,
    names_of,
    pieces,
    text_length,
    texts_of,
)
from formary.recipe.sizes import (
    BATCH,
    context_for,
    parameter_estimate,
    size_for,
    steps_for,
    token_counts,
    tokenizer_for,
)

_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’」』)）]*$")
# How chapters begin, likeliest first: the pattern goes into the recipe as data.documents.
_CHAPTERS = (
    "第[一二三四五六七八九十百千零〇两0-9]+[回章卷节節]",
    "[Cc][Hh][Aa][Pp][Tt][Ee][Rr] [0-9IVXLCivxlc]+",
    "# ",
)
_TEXT_NAMES = ("text", "content", "body", "document", "article", "passage", "story", "review", "sentence", "message")

_PRESETS = {"causal_lm": "gpt-mini", "masked_lm": "bert-mini", "denoise": "seq2seq-mini"}
_LEARNS = {
    "causal_lm": "learns to write on: every next token is predicted",
    "masked_lm": "learns to fill gaps, reading both ways",
    "denoise": "learns to restore removed spans, an encoder-decoder",
}
# Share of the weights that a token of the text meets: of an encoder-decoder most tokens meet the encoder only.
_COMPUTED = {"denoise": 0.5}
_HASH_DOCUMENTS = 100  # fewer documents than this may leave a hash split without any for validation or test


@dataclass(frozen=True)
class Guess:
    """A recipe as commented YAML, what it rests on, and what a run of it will be."""

    recipe: str
    task: str
    saw: tuple[str, ...]  # sentences about the data
    parameters: int
    seconds: float  # of training, roughly
    before: tuple[tuple[str, str], ...] = ()  # (file name, recipe) of those whose models it starts from


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
    seen = look(texts_of(sample, column.value, documents.value), sample.share, files=sample.files, cut=documents.value)
    tokenizer = tokenizer_for(seen, chosen.value)
    vocab_size, tokens = token_counts(seen, tokenizer)
    split = _split_of(sample, seen, cut_anywhere=sample.files == 1 and documents.value == "file")
    training = max(1, int(tokens * (1 - split.validation - split.test)))
    context = context_for(seen, tokens, training)
    size, passes = size_for(training)
    parameters = parameter_estimate(chosen.value, size.value, vocab_size, context.value)
    computed = parameters * _COMPUTED.get(chosen.value, 1.0)
    steps, seconds = steps_for(training, passes, context.value, computed, gflops)
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
    lines.add(1, "batch", BATCH, "sequences per step")
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
        found = pieces(joined, pattern)
        if len(found) / sample.share >= 20 and max(map(len, found)) < 0.2 * len(joined):
            return Choice(
                pattern, f"a chapter is a document: about {rounded(len(found) / sample.share)} begin like this"
            )
    lines = [line for line in joined.split("\n") if line.strip()]
    paragraphs = pieces(joined, "paragraph")
    chinese = cjk_share(joined) > 0.3
    if chinese and len(paragraphs) / sample.share >= _HASH_DOCUMENTS:
        # Chinese prose puts no blank lines between its paragraphs, so these are texts of their own.
        return Choice("paragraph", f"blank lines separate about {rounded(len(paragraphs) / sample.share)} texts")
    ended = sum(bool(_SENTENCE_END.search(line.strip())) for line in lines)
    alone = len(lines) == len(paragraphs) or (len(paragraphs) < 0.01 * len(lines) and ended > 0.6 * len(lines))
    if alone and len(lines) / sample.share >= _HASH_DOCUMENTS:
        return Choice("line", f"about {rounded(len(lines) / sample.share)} lines that stand alone")
    return Choice("file", "one running text" if sample.files == 1 else f"{sample.files} running texts")


def _split_of(sample: Sample, seen: Seen, *, cut_anywhere: bool) -> _Split:
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


def _prompts(seen: Seen, task: str) -> list[str]:
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
    seen: Seen,
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


def _words(seen: Seen, chinese_words: bool) -> Choice:
    """Where words begin, for whole-word masking."""
    if seen.cjk <= 0.3:
        return Choice("tokenizer", "marks where words begin, for masking whole words")
    if chinese_words:
        return Choice("jieba", "finds the Chinese words, for masking whole words")
    return Choice("none", 'jieba finds Chinese words for whole-word masking: pip install "formary[zh]"')


def _write_training(lines: Lines, task: str, steps: int, seen: Seen, chinese_words: bool) -> None:
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
    every = max(20, round_steps(steps // 10))
    lines.add(1, "validate_every", every, "steps; the best model is kept")
    lines.add(1, "save_every", max(100, every * 2), "steps; a stopped run goes on from here")
    if task == "causal_lm":
        lines.add(1, "sample_every", every * 2, "steps; watch it learn to write")


def _sentences(sample: Sample, column: Choice, documents: Choice, seen: Seen, tokens: int) -> Iterator[str]:
    looked = "all of it was looked at" if sample.share > 0.999 else f"{percent(sample.share)} of it was looked at"
    yield f"{files_of(sample)}, about {megabytes(seen.bytes)} of text; {looked}"
    if sample.kind != "text":
        others = [describe(sample.rows, name) for name in names_of(sample.rows) if name != column.value]
        yield f"text is in column {column.value}" + (f"; beside it {', '.join(others)}" if others else "")
    else:
        yield f"documents: {documents.value} ({documents.why})"
    count = f"{rounded(seen.count)} documents" if seen.count != 1 else "1 document"
    about = "" if sample.share > 0.999 else "about "
    whole = sum(seen.lengths) / seen.share
    typical = f"{rounded(median(seen.lengths))} characters in a typical one"
    typical = typical if seen.count != 1 else f"{rounded(whole)} characters"
    yield f"{about}{count}, {typical}, about {rounded(tokens)} tokens"
    if seen.cjk > 0.02:
        yield f"{percent(seen.cjk)} of the letters are Chinese or Japanese"
    if sample.encoding != "utf-8":
        yield f"encoding {sample.encoding}"
    for part in ("validation", "test"):
        if getattr(sample, part):
            yield f"for {part}: {', '.join(getattr(sample, part))}"
