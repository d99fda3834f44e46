"""Text to token ids and back: training, loading and saving tokenizers in the Hugging Face format.

The one idea: a thin class around `tokenizers.Tokenizer` that also knows which ids are special, and is always fast.
It never writes token shards, and it adds no special tokens to a text: that is the task's business.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from formary import durable
from formary.data.alphabets import BYTE_TOKEN, byte_level_bytes, bytes_pre_tokenizer, each_character, is_cjk, state_of
from formary.data.seams import seam_of
from formary.data.special_tokens import KNOWN_NAMES, ROLES
from formary.data.stream_decoder import ByteStream, StreamDecoder, WindowStream
from formary.data.tokenizer_files import read_files
from formary.data.vocabulary import trained
from formary.recipe import schema

__all__ = ["ROLES", "IntArray", "StreamDecoder", "Tokenizer", "is_cjk", "load", "names_as_tokens", "train", "wordless"]

IntArray = np.ndarray[Any, np.dtype[Any]]

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


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
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return ByteStream(self.backend, skipped)
        return WindowStream(self.backend, skipped)

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
                surfaces[number] = byte_level_bytes(name)
            elif wordpiece:
                surfaces[number] = name.removeprefix(self.backend.model.continuing_subword_prefix).encode()
            elif match := BYTE_TOKEN.fullmatch(name):
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
        return next((self.vocab[name] for name in KNOWN_NAMES[role] if name in self.vocab), None)

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
        state = state_of(self.backend.pre_tokenizer)
        model = self.backend.model
        plain = self.backend.get_vocab(with_added_tokens=False)
        if isinstance(model, models.WordLevel) and state == state_of(each_character()):
            letters = {ord(name): number for name, number in plain.items() if len(name) == 1}
            if not letters or self.unk_id is None or self.vocab.get(model.unk_token) != self.unk_id:
                return None
            table = np.full(max(letters) + 2, self.unk_id, dtype=np.uint32)
            table[list(letters)] = list(letters.values())
            return table
        if isinstance(model, models.BPE) and state == state_of(bytes_pre_tokenizer()):
            numbers = {byte_level_bytes(name)[0]: number for name, number in plain.items() if len(name) == 1}
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
        return None if self._table is not None else seam_of(self.backend)


def train(texts: Iterable[str], recipe: schema.Tokenizer, *, task: str) -> Tokenizer:
    """Train a tokenizer of `recipe.kind`; the same texts give the same tokenizer, byte for byte.

    `texts` is read once. `characters` looks at all of it (every character becomes a token, whatever
    `vocab_size` is); the others see an even sample of at most `recipe.sample_chars` characters.
    Special tokens follow the task: see `special_tokens.SPECIALS`; denoise adds up to 100 <extra_id_N>, chat ChatML's.

    Raises:
        RecipeError: the text does not allow a vocabulary of `vocab_size` tokens, or its alphabet needs more.
        DataError: there is no text.
    """
    return Tokenizer(*trained(texts, recipe, task=task))


def wordless() -> Tokenizer:
    """The tokenizer of what reads no words (pictures, series): a vocabulary of nothing."""
    return Tokenizer(tokenizers.Tokenizer(models.WordLevel({}, unk_token="")))


def names_as_tokens(names: Sequence[str], roles: Mapping[str, str]) -> Tokenizer:
    """A token for each of the names of some things, after the special ones by role; a text of them has one a line."""
    vocab = {name: number for number, name in enumerate([*roles.values(), *names])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=roles["unk"]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in roles.values()])
    return Tokenizer(backend, {f"{role}_token": name for role, name in roles.items()})


def load(path: Path | str) -> Tokenizer:
    """Open a tokenizer.json, a vocab.txt (BERT), a vocab.json with its merges.txt (GPT-2), or a folder of these.

    The special tokens come from tokenizer_config.json, special_tokens_map.json and config.json beside it, and
    where these are silent from the usual names.

    Raises:
        DataError: the files are not there, or do not hold a tokenizer.
    """
    return Tokenizer(*read_files(path))
