"""Text to token ids and back: training, loading and saving tokenizers in the Hugging Face format.

The one idea: a thin class around `tokenizers.Tokenizer` that also knows which ids are special, and is always fast.
It never writes token shards, and it adds no special tokens to a text: that is the task's business.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from formary import durable
from formary.errors import DataError, RecipeError, nearest
from formary.recipe import schema

IntArray = np.ndarray[Any, np.dtype[Any]]

ROLES = ("bos", "eos", "pad", "mask", "cls", "sep", "unk")

_SPECIALS: dict[str, dict[str, str]] = {
    "causal_lm": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    "masked_lm": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "denoise": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "chat": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
}
_AROUND_TURNS = "system\nuser\nassistant\n"
_TURNS = ("<|im_start|>", "<|im_end|>")  # chat: what ChatML puts around a message
_NEEDS_UNK = ("wordpiece", "unigram", "characters")
_MOST_SENTINELS = 100  # as T5

# What a tokenizer without any configuration beside it calls its special tokens, likeliest first.
_KNOWN_NAMES: dict[str, tuple[str, ...]] = {
    "bos": ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "pad": ("<pad>", "[PAD]", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "unk": ("[UNK]", "<unk>"),
}
_ANY_CHARACTER = r"[\s\S]"
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StreamDecoder(Protocol):
    """Turns ids into text as they arrive; `push` returns only whole characters, `flush` what is left."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer:
    """A Hugging Face tokenizer and the ids of its special tokens.

    `bos_id`, `eos_id`, `pad_id`, `mask_id`, `cls_id`, `sep_id`, `unk_id` are None where it has none;
    `sentinel_ids` are those of <extra_id_0>, <extra_id_1>, ... (T5's span markers), in that order.
    `config` is what tokenizer_config.json holds (chat template included) and is written back by `save`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.config: dict[str, Any] = dict(config or {})
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self.vocab.values(), default=-1) + 1
        self.bos_id = self._role("bos")
        self.eos_id = self._role("eos")
        self.pad_id = self._role("pad")
        self.mask_id = self._role("mask")
        self.cls_id = self._role("cls")
        self.sep_id = self._role("sep")
        self.unk_id = self._role("unk")
        sentinels = sorted(
            (int(match[1]), number) for name, number in self.vocab.items() if (match := _SENTINEL.fullmatch(name))
        )
        self.sentinel_ids: list[int] = [number for _, number in sentinels]

    # --- text to ids ---

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special token added."""
        return list(map(int, self.encode_batch([text])[0]))

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """Token ids of each text, uint32 arrays; spread over threads, the interpreter lock released meanwhile."""
        if self._table is not None and not any(map(self._holds_added_token, texts)):
            return [self._look_up(text) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.frombuffer(array("I", encoding.ids), dtype=np.uint32) for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[IntArray, IntArray]]:
        """Per text its ids (n,) uint32 and the span of characters of each token (n, 2) int64."""
        return [
            (np.array(found.ids, dtype=np.uint32), np.array(found.offsets, dtype=np.int64).reshape(-1, 2))
            for found in self.backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def pieces(self, text: str, chars: int) -> Iterator[str]:
        """Cut a long text into pieces of about `chars` characters whose tokens, joined, are those of the whole.

        Cuts only where the pre-tokenizer always ends a word; a text without such a place stays whole.
        """
        seam = self._seam
        if seam is None:
            yield text
            return
        begin = 0
        while len(text) - begin > chars:
            found = seam.search(text, begin + chars)
            if found is None:
                break
            yield text[begin : found.start()]
            begin = found.start()
        yield text[begin:]

    # --- ids to text ---

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are no valid UTF-8 appear as U+FFFD."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def stream_decoder(self, *, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder fed one id at a time; what it returns, joined, is `decode` of all the ids."""
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return _ByteStream(self, skip_special_tokens)
        return _WindowStream(self, skip_special_tokens)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token stands for, in bytes, by id: a space mark as the space, '##' removed (gaps are empty)."""
        added = {number: token.content for number, token in self.backend.get_added_tokens_decoder().items()}
        byte_level = isinstance(self.backend.decoder, decoders.ByteLevel)
        wordpiece = isinstance(self.backend.model, models.WordPiece)
        surfaces = [b""] * self.vocab_size
        for name, number in self.vocab.items():
            if number in added:
                surfaces[number] = name.encode()
            elif byte_level:
                surfaces[number] = _byte_level_bytes(name)
            elif wordpiece:
                surfaces[number] = name.removeprefix(self.backend.model.continuing_subword_prefix).encode()
            elif match := _BYTE_TOKEN.fullmatch(name):
                surfaces[number] = bytes([int(match[1], 16)])
            else:
                surfaces[number] = name.replace("▁", " ").encode()
        return surfaces

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the added tokens that are marked special."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    # --- on disk ---

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them, into `folder`."""
        folder = Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        names = {number: name for name, number in self.vocab.items()}
        for role in ROLES:
            number = getattr(self, f"{role}_id")
            if number is not None:
                config.setdefault(f"{role}_token", names[number])
        durable.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        durable.write_json(folder / "tokenizer_config.json", config)

    # --- parts ---

    def _role(self, role: str) -> int | None:
        key = f"{role}_token"
        if key in self.config:
            name = self.config[key]
            name = name.get("content") if isinstance(name, dict) else name
            return None if name is None else self.vocab.get(str(name))
        return next((self.vocab[name] for name in _KNOWN_NAMES[role] if name in self.vocab), None)

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        names = [token.content for token in self.backend.get_added_tokens_decoder().values()]
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _holds_added_token(self, text: str) -> bool:
        return self._added is not None and self._added.search(text) is not None

    @cached_property
    def _table(self) -> IntArray | None:
        """Ids by code point (characters) or by byte (bytes), for the two kinds that need no search at all."""
        if self.backend.normalizer is not None or self.backend.pre_tokenizer is None:
            return None
        state = _state(self.backend.pre_tokenizer)
        model = self.backend.model
        plain = self.backend.get_vocab(with_added_tokens=False)
        if isinstance(model, models.WordLevel) and state == _state(_each_character()):
            letters = {ord(name): number for name, number in plain.items() if len(name) == 1}
            if not letters or self.unk_id is None or self.vocab.get(model.unk_token) != self.unk_id:
                return None
            table = np.full(max(letters) + 2, self.unk_id, dtype=np.uint32)
            table[list(letters)] = list(letters.values())
            return table
        if isinstance(model, models.BPE) and state == _state(_bytes_pre_tokenizer()):
            numbers = {_byte_level_bytes(name)[0]: number for name, number in plain.items() if len(name) == 1}
            # A longer entry that is no added token is a merge: then bytes alone are not the encoding.
            added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
            if len(numbers) == 256 and all(len(name) == 1 or name in added for name in plain):
                return np.array([numbers[byte] for byte in range(256)], dtype=np.uint32)
        return None

    def _look_up(self, text: str) -> IntArray:
        table = self._table
        assert table is not None
        if isinstance(self.backend.model, models.BPE):
            return np.asarray(table[np.frombuffer(text.encode(), dtype=np.uint8)])
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return np.asarray(table[np.minimum(points, len(table) - 1)])

    @cached_property
    def _seam(self) -> re.Pattern[str] | None:
        """Where a text may be cut without changing its tokens (None: nowhere that is certain).

        Between a word and the single space before the next, where words carry the space before them, or after
        a single newline between words, where newlines are words of their own.
        """
        if self._table is not None or not _keeps_spaces(self.backend.normalizer):
            return None
        space, newline = _splits_at(self.backend.pre_tokenizer)
        for token in self.backend.get_added_tokens_decoder().values():
            newline = newline and not token.lstrip and not token.rstrip
            space = space and not token.rstrip and not re.search(r"\s", token.content)
        newline = newline and space
        if not space:
            return None
        return re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)" if newline else r"(?<=\S)(?= \S)")


# --- training -------------------------------------------------------------------------------------------------


def train(texts: Iterable[str], recipe: schema.Tokenizer, *, task: str) -> Tokenizer:
    """Train a tokenizer of `recipe.kind`; the same texts give the same tokenizer, byte for byte.

    `texts` is read once. `characters` looks at all of it (every character becomes a token, whatever
    `vocab_size` is); the others see an even sample of at most `recipe.sample_chars` characters.
    Special tokens follow the task: see `_SPECIALS`; denoise adds up to 100 <extra_id_N>, chat ChatML's.

    Raises:
        RecipeError: the text does not allow a vocabulary of `vocab_size` tokens, or its alphabet needs more.
        DataError: there is no text.
    """
    if task not in _SPECIALS:
        raise RecipeError(
            f"task: '{task}' has no special tokens to train a tokenizer with; known are {', '.join(_SPECIALS)}. "
            + nearest(task, _SPECIALS)
        )
    roles = dict(_SPECIALS[task])
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
    return Tokenizer(backend, config)


def _byte_vocabulary(special: list[str]) -> tokenizers.Tokenizer:
    letters = _BYTE_LETTERS
    vocab = {name: number for number, name in enumerate([*special, *(letters[byte] for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = _bytes_pre_tokenizer()
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
    backend.pre_tokenizer = _each_character()
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


# --- loading --------------------------------------------------------------------------------------------------


def load(path: Path | str) -> Tokenizer:
    """Open a tokenizer.json, a vocab.txt (BERT), a vocab.json with its merges.txt (GPT-2), or a folder of these.

    The special tokens come from tokenizer_config.json, special_tokens_map.json and config.json beside it, and
    where these are silent from the usual names.

    Raises:
        DataError: the files are not there, or do not hold a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        file = _tokenizer_file(path)
    elif path.is_file():
        file = path
    else:
        raise DataError(f"{path}: no such tokenizer; data.tokenizer.path takes a file or a model folder")
    settings = _settings(file.parent)
    try:
        if file.suffix == ".txt" and not file.name.endswith("merges.txt"):
            backend = _from_vocab_txt(file, settings)
        elif file.name.endswith(("vocab.json", "merges.txt")):
            backend = _from_vocab_and_merges(file, settings)
        else:
            backend = tokenizers.Tokenizer.from_file(str(file))
    except (DataError, OSError):
        raise
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"{file}: does not hold a tokenizer ({error})") from error
    # Ids in config.json name the roles that the tokenizer's own files leave open.
    ids = settings.pop("config.json")
    names = {number: name for name, number in backend.get_vocab(with_added_tokens=True).items()}
    for role in ROLES:
        number = ids.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if f"{role}_token" not in settings and isinstance(number, int) and number in names:
            settings[f"{role}_token"] = names[number]
    return Tokenizer(backend, settings)


def _tokenizer_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.txt", "vocab.json"):
        if (folder / name).is_file():
            return folder / name
    found = [
        name for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model") if (folder / name).exists()
    ]
    hint = (
        f"; {found[0]} is SentencePiece's own format: open the model once with transformers and save_pretrained it, "
        "which writes tokenizer.json"
        if found
        else ""
    )
    raise DataError(f"{folder}: holds no tokenizer.json, vocab.txt or vocab.json with merges.txt{hint}")


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; config.json under its own name; chat_template.jinja."""
    read: dict[str, dict[str, Any]] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            value = {}
        except ValueError as error:
            raise DataError(f"{folder / name}: is not JSON ({error})") from error
        read[name] = value if isinstance(value, dict) else {}
    merged = read["special_tokens_map.json"] | read["tokenizer_config.json"]
    template = folder / "chat_template.jinja"
    if template.is_file():
        merged["chat_template"] = template.read_text(encoding="utf-8")
    return merged | {"config.json": read["config.json"]}


def _from_vocab_txt(file: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    names = file.read_text(encoding="utf-8").split("\n")
    if names and not names[-1]:
        names.pop()
    names = [name.rstrip("\r") for name in names]
    vocab = {name: number for number, name in enumerate(names)}
    unk = _token_name(settings.get("unk_token")) or "[UNK]"
    if unk not in vocab:
        raise DataError(f"{file}: holds no {unk}; a BERT vocabulary has one token a line, {unk} among them")
    lowercase = settings.get("do_lower_case")
    if lowercase is None:  # an uncased vocabulary has no capital outside the special tokens
        lowercase = not any(name.lower() != name for name in names if not re.fullmatch(r"\[.*\]|<.*>", name))
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(lowercase),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _add_specials(backend, file.parent, settings, ("pad", "unk", "cls", "sep", "mask"))
    cls, sep = (_token_name(settings.get(f"{role}_token")) or f"[{role.upper()}]" for role in ("cls", "sep"))
    if cls in vocab and sep in vocab:
        backend.post_processor = processors.BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))
    return backend


def _from_vocab_and_merges(file: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab, merges = (
        file.with_name(re.sub(r"(vocab\.json|merges\.txt)$", name, file.name)) for name in ("vocab.json", "merges.txt")
    )
    for part in (vocab, merges):
        if not part.is_file():
            raise DataError(f"{part}: is missing; a GPT-2 tokenizer is a vocab.json with its merges.txt beside it")
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    prefix = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    _add_specials(backend, file.parent, settings, ROLES)
    return backend


def _add_specials(
    backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any], roles: Sequence[str]
) -> None:
    """Mark the special tokens of a vocabulary that came without any list of them; append those added later."""
    vocab = backend.get_vocab()
    declared = [_token_name(settings.get(f"{role}_token")) for role in roles]
    usual = [name for role in roles for name in _KNOWN_NAMES[role]]
    names = dict.fromkeys(name for name in [*declared, *usual] if name is not None and name in vocab)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    later: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        later |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    for number, token in dict(settings.get("added_tokens_decoder") or {}).items():
        later[str(_token_name(token))] = int(number)
    for name in sorted(later, key=later.__getitem__):
        if backend.token_to_id(name) is None and later[name] == backend.get_vocab_size():
            backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])


def _token_name(token: Any) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return None if token is None else str(token)


# --- decoding as tokens arrive --------------------------------------------------------------------------------


class _ByteStream:
    """For byte-level tokenizers: their bytes through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        if token in self._skipped:
            return ""
        name = self._tokenizer.backend.id_to_token(token)
        return self._utf8.decode(_byte_level_bytes(name)) if name is not None else ""

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowStream:
    """For any other tokenizer: decode a short window with and without the new tokens, and give the difference."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._given: list[int] = []  # the last token whose text is out: decoders look one back
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character (or a run of byte tokens) is unfinished."""
        name = self._tokenizer.backend.id_to_token(token)
        if token in self._skipped or name is None:
            return ""
        self._held.append(token)
        if _BYTE_TOKEN.fullmatch(name):  # decoders judge a run of byte tokens as a whole
            return ""
        return self._give()

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character."""
        return self._give(final=True)

    def _give(self, final: bool = False) -> str:
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._given)
        text = self._tokenizer.decode([*self._given, *self._held])
        if text.endswith("�") and not final:
            return ""
        self._given, self._held = self._held[-1:], []
        return text[len(before) :]


# --- the alphabet of byte-level tokenizers ----------------------------------------------------------------------


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte (Radford et al. 2019): itself where printable, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()
_LETTER_BYTES = {letter: byte for byte, letter in _BYTE_LETTERS.items()}


def _byte_level_bytes(name: str) -> bytes:
    try:
        return bytes(_LETTER_BYTES[letter] for letter in name)
    except KeyError:  # an added token in its own spelling
        return name.encode()


def is_cjk(point: int) -> bool:
    """Whether a code point is a Chinese, Japanese or Korean character that is a word unit of its own."""
    return 0x2E80 <= point <= 0x9FFF or 0xF900 <= point <= 0xFAFF or 0x20000 <= point <= 0x323AF


def _each_character() -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(_ANY_CHARACTER), "isolated")


def _bytes_pre_tokenizer() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _state(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _keeps_spaces(normalizer: Any) -> bool:
    """Whether the normalizer treats the two sides of a space apart and removes no space at the ends."""

    def harmless(state: Mapping[str, Any]) -> bool:
        if state["type"] == "Sequence":
            return all(map(harmless, state["normalizers"]))
        return state["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer", "StripAccents")

    return normalizer is None or harmless(_state(normalizer))


def _splits_at(pre_tokenizer: Any) -> tuple[bool, bool]:
    """Whether words always end before a single space, and whether they always end after a single newline."""

    def split(state: Mapping[str, Any]) -> tuple[bool, bool]:
        kind = state["type"]
        if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
            return True, True
        if kind == "ByteLevel":
            return bool(state["use_regex"]), bool(state["use_regex"] and not state["add_prefix_space"])
        if kind == "Metaspace":
            return bool(state.get("split", True)), False
        if kind == "Split":
            pattern = state["pattern"]
            whole = pattern.get("Regex", "").endswith(r"\s+(?!\S)|\s+")  # GPT-2, GPT-4, Llama 3, Qwen
            return whole, whole or (pattern.get("String") == "\n" and state["behavior"] == "Isolated")
        return False, False

    if pre_tokenizer is None:
        return False, False
    state = _state(pre_tokenizer)
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if any(part["type"] not in _SPLITTERS for part in parts):
        return False, False
    adds_space = any(
        (part["type"] == "ByteLevel" and part["add_prefix_space"])
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )
    found = [split(part) for part in parts]
    return any(space for space, _ in found), any(newline for _, newline in found) and not adds_space


_SPLITTERS = (
    "BertPreTokenizer",
    "Whitespace",
    "WhitespaceSplit",
    "ByteLevel",
    "Metaspace",
    "Split",
    "Digits",
    "Punctuation",
)
