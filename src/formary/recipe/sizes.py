"""How large a guessed recipe is: vocabulary, context, model and steps for the text there is and the time they take.

Every rule is a function from what was counted to a value and why; estimates are rough, and say so.
"""

from __future__ import annotations

import re
from collections import Counter
from statistics import median
from typing import Any

from formary.recipe.commented import Choice, duration, megabytes, passes_over, percent, round_steps, rounded
from formary.recipe.sample import Seen

# Words as byte-level BPE separates them (Radford et al. 2019), without runs of white space.
_WORD = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+")
# Text bytes up to which a byte-level BPE or WordPiece vocabulary of this size pays.
_VOCABULARIES = ((300_000, 1024), (3_000_000, 2048), (30_000_000, 4096), (300_000_000, 8192), (None, 16384))
# Training tokens up to which a model of this size pays, and how often it may read them before it learns them by heart.
_SIZES = ((100_000, "4x128", 16), (5_000_000, "6x256", 8), (50_000_000, "6x384", 3), (None, "8x512", 1))
_SPECIAL_TOKENS = {"causal_lm": 1, "masked_lm": 5, "denoise": 103}
BATCH = 16
_LONGEST = 1800.0  # seconds that a first run may take
REACHED = 0.7  # share of the measured matrix speed that training reaches


def tokenizer_for(seen: Seen, task: str) -> Choice:
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


def _allowed_vocabulary(seen: Seen, task: str) -> int:
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


def token_counts(seen: Seen, tokenizer: Choice) -> tuple[int, int]:
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


def context_for(seen: Seen, tokens: int, training: int) -> Choice:
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


def size_for(training: int) -> tuple[Choice, float]:
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


def steps_for(training: int, passes: float, context: int, parameters: float, gflops: float) -> tuple[Choice, float]:
    """Steps for so many passes, or as many as half an hour allows; and the seconds they take, roughly.

    A step computes 6 operations per parameter and token (Kaplan et al. 2020, section 2.1).
    """
    per_step = BATCH * context
    seconds_per_step = 6 * parameters * per_step / (gflops * 1e9 * REACHED)
    wanted = max(200, round(training * passes / per_step))
    allowed = max(200, int(_LONGEST / seconds_per_step))
    if wanted <= allowed:
        steps = round_steps(wanted)
        seconds = steps * seconds_per_step
        seen = steps * per_step / training
        return Choice(steps, f"{passes_over(seen)} over the training text; roughly {duration(seconds)} here"), seconds
    steps = round_steps(allowed)
    seconds, full = steps * seconds_per_step, wanted * seconds_per_step
    why = f"roughly {duration(seconds)} here; {round_steps(wanted)} ({duration(full)}) would make more of this text"
    return Choice(steps, why), seconds
