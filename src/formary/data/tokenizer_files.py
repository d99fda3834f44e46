"""The files that tokenizers come in: tokenizer.json, a BERT vocab.txt, a GPT-2 vocab.json with merges.txt, settings beside.

They are only read here; what is written is `tokenizer`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from formary.data.special_tokens import KNOWN_NAMES, ROLES
from formary.errors import DataError


def read_files(path: Path | str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The backend of `tokenizer.load`, and its settings."""
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
    return backend, settings


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
    usual = [name for role in roles for name in KNOWN_NAMES[role]]
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
