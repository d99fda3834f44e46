"""Training a vocabulary: bytes, characters, BPE, WordPiece or Unigram; the same texts give the same one, byte for byte.

What the library leaves to chance (the order of a hash table, sums of floats) is settled here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from formary.data.alphabets import BYTE_LETTERS, bytes_pre_tokenizer, each_character
from formary.data.special_tokens import ROLES, SPECIALS
from formary.errors import DataError, RecipeError, nearest
from formary.recipe import schema

_AROUND_TURNS = "system\nuser\nassistant\n"
_TURNS = ("<|im_start|>", "<|im_end|>")  # chat: what ChatML puts around a message
_NEEDS_UNK = ("wordpiece", "unigram", "characters")
_MOST_SENTINELS = 100  # as T5


def trained(
    texts: Iterable[str], recipe: schema.Tokenizer, *, task: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The backend of `tokenizer.train`, and its configuration for transformers."""
    if task not in SPECIALS:
        raise RecipeError(
            f"task: '{task}' has no special tokens to train a tokenizer with; known are {', '.join(SPECIALS)}. "
            + nearest(task, SPECIALS)
        )
    roles = dict(SPECIALS[task])
    if recipe.kind in _NEEDS_UNK:
        roles.setdefault("unk", "<unk>")
        if task == "chat":  # what a chat template writes around the messages must not be unknown
            texts = chain(texts, [_AROUND_TURNS])
    special = [*dict.fromkeys(roles.values()), *(_TURNS if task == "chat" else ())]
    if task == "denoise":
        fixed = recipe.kind in ("characters", "bytes")
        count = _MOST_SENTINELS if fixed else max(1, min(_MOST_SENTINELS, recipe.vocab_size // 20))
        special += [f"<extra_id_{number}>" for number in range(count)]

    if recipe.kind == "bytes":
        backend = _byte_vocabulary(special)
    elif recipe.kind == "characters":
        backend = _character_vocabulary(texts, special, roles["unk"])
    else:
        sample = _sample(texts, recipe.sample_chars)
        if not sample:
            raise DataError("there is no text to train the tokenizer on; look at data.sources and data.clean")
        build = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[recipe.kind]
        backend = build(sample, special, roles.get("unk"), recipe)
        _check_size(backend, sample, recipe)
    if recipe.lowercase and backend.normalizer is None:
        backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    _add_template(backend, task)

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": roles.get(role) for role in ROLES if role in roles}
    if task != "masked_lm":
        config["model_input_names"] = ["input_ids", "attention_mask"]
    return backend, config


def _byte_vocabulary(special: list[str]) -> tokenizers.Tokenizer:
    letters = BYTE_LETTERS
    vocab = {name: number for number, name in enumerate([*special, *(letters[byte] for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = bytes_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _character_vocabulary(texts: Iterable[str], special: list[str], unk: str) -> tokenizers.Tokenizer:
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    if not alphabet:
        raise DataError("there is no text to take the characters from; look at data.sources and data.clean")
    vocab = {name: number for number, name in enumerate([*special, *sorted(alphabet)])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token=unk))
    backend.pre_tokenizer = each_character()
    backend.decoder = decoders.Fuse()
    return backend


def _train_bpe(
    sample: list[str], special: list[str], unk: str | None, recipe: schema.Tokenizer
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if recipe.lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=2,  # a pair seen once is no pattern
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer=trainer)
    return backend


def _train_wordpiece(
    sample: list[str], special: list[str], unk: str | None, recipe: schema.Tokenizer
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(lowercase=recipe.lowercase, strip_accents=recipe.lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    counts: Counter[str] = Counter()
    for text in sample:
        counts.update(backend.normalizer.normalize_str(text))
    seen = sorted((name for name in counts if not name.isspace()), key=lambda name: (-counts[name], name))
    joins = {
        name
        for name in seen
        if len(backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{name}a"))) == 1
    }
    rare: list[str] = []
    if len(special) + len(seen) + len(joins) > recipe.vocab_size:
        # Rare characters give way to words: they are unknown, and 3/4 of the vocabulary at most is characters.
        costs = np.cumsum([1 + (name in joins) for name in seen])
        count = max(1, int(np.searchsorted(costs, 3 * (recipe.vocab_size - len(special)) // 4, side="right")))
        seen, rare = seen[:count], seen[count:]
    alphabet = sorted(seen)
    inside = [f"##{name}" for name in alphabet if name in joins]
    # The library numbers "##x" in the order of a randomly seeded hash table and breaks ties by number; given
    # up front as special tokens the numbers are fixed, and so is the result.
    fixed = [*special, *inside]
    trainer = trainers.WordPieceTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=2,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer=trainer)
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    for name in rare:  # Chinese characters form no longer tokens: what room the words leave is theirs
        for token in [name, f"##{name}"] if name in joins else [name]:
            if len(vocab) < recipe.vocab_size:
                vocab.setdefault(token, len(vocab))
    backend.model = models.WordPiece(vocab=vocab, unk_token=unk)
    clean = tokenizers.Tokenizer(backend.model)
    clean.normalizer, clean.pre_tokenizer, clean.decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    return clean


def _train_unigram(
    sample: list[str], special: list[str], unk: str | None, recipe: schema.Tokenizer
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    if recipe.lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=recipe.vocab_size, special_tokens=special, unk_token=unk, show_progress=False
    )
    try:
        backend.train_from_iterator(sample, trainer=trainer)
    except Exception as error:
        if "not large enough to contain all chars" not in str(error):
            raise
        raise RecipeError(
            f"data.tokenizer.vocab_size: {recipe.vocab_size} is fewer than the distinct characters of the text "
            f"({len(set().union(*sample))}); raise it, or set data.tokenizer.kind to bpe, which spells rare "
            "characters in bytes"
        ) from error
    state = json.loads(backend.to_str())["model"]
    backend.model = models.Unigram(vocab=_canonical(state["vocab"], len(special)), unk_id=state["unk_id"])
    return backend


def _canonical(vocab: list[tuple[str, float]], specials: int) -> list[tuple[str, float]]:
    """Scores and order of a Unigram vocabulary without what differs from one training to the next.

    The library sums floats in the order of a randomly seeded hash table (differences of 1e-12), and gives the
    rare characters made-up scores, 0.0001 apart, in that order: those become the one lowest score.
    """
    head, body = vocab[:specials], vocab[specials:]
    lowest = min((score for _, score in body), default=0.0)
    highest_made_up = lowest + 0.0001 * sum(len(name) == 1 for name, _ in body)
    body = [(name, round(lowest if len(name) == 1 and score <= highest_made_up else score, 6)) for name, score in body]
    return [(name, score) for name, score in head] + sorted(body, key=lambda piece: (-piece[1], piece[0]))


def _check_size(backend: tokenizers.Tokenizer, sample: list[str], recipe: schema.Tokenizer) -> None:
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached < recipe.vocab_size:
        raise RecipeError(
            f"data.tokenizer.vocab_size: the training text ({sum(map(len, sample)):,} characters) allows no more "
            f"than {reached} {recipe.kind} tokens, and {recipe.vocab_size} are asked for; "
            f"set data.tokenizer.vocab_size to {reached} or less, or add data"
        )
    if reached > recipe.vocab_size:
        raise RecipeError(
            f"data.tokenizer.vocab_size: {recipe.vocab_size} is too small, the special tokens and the "
            f"{'256 bytes' if recipe.kind == 'bpe' else 'alphabet'} alone take {reached}; set it above {reached}"
        )


def _add_template(backend: tokenizers.Tokenizer, task: str) -> None:
    """What transformers' users get around a text: [CLS] text [SEP] as in BERT, text </s> as in T5."""
    if task == "masked_lm":
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
    if task == "denoise":
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    """At most `limit` characters, spread evenly over the texts: every k-th stretch, k doubling as they grow."""
    kept: list[str] = []
    total, every, index = 0, 1, 0
    for text in texts:
        for stretch in _stretches(text):
            if index % every == 0:
                kept.append(stretch)
                total += len(stretch)
                while total > limit and len(kept) > 1:
                    kept = kept[::2]
                    every *= 2
                    total = sum(map(len, kept))
            index += 1
    return [kept[0][:limit]] if len(kept) == 1 and total > limit else kept


def _stretches(text: str, chars: int = 20_000) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = begin + chars
        if end < len(text):
            end = max(text.rfind("\n", begin + chars // 2, end), text.rfind(" ", begin + chars // 2, end), -1)
            end = begin + chars if end < 0 else end
        yield text[begin:end]
        begin = end
