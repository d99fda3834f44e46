"""Answers that follow a JSON schema, a regular expression or a list of choices: which tokens may come next.

The grammar is matched by llguidance over bytes; this file tells it what each token writes, which can differ between
the first token of an answer and the later ones, and reads its masks. It does not sample; end tokens are added here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tokenizers import decoders
from torch import Tensor

from formary.data.tokenizer import Tokenizer
from formary.errors import MissingExtra, RequestError
from formary.infer import json_schema as schemas

if TYPE_CHECKING:
    from formary.infer.sampling import Constraint

_LONGEST_REGEX = 4_096
_MOST_CHOICES = 1_000
_LONGEST_CHOICES = 64 * 1024  # bytes, all together
_MOST_BLAMED = 200
_KEPT = 32  # compiled grammars for each tokenizer

# Where JSON allows whitespace an answer may have one space, or a line break with up to 16 spaces: what models write
# by themselves, but no endless blanks. \u escapes would allow a second spelling of a property's name.
_JSON_STYLE = {"whitespace_pattern": " |\n {0,16}", "json_allowed_escapes": 'nrbtf\\"'}
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}

_MEANINGS = {
    "panic": "is too large once compiled",
    "schema too large": "is too large once compiled",
    "grammar size": "is too large once compiled",
    "fuel": "is too intricate",
    "Unable to determine if regex is empty": "the patterns that one text must match together are too intricate",
    "Regex is empty": "no text has the pattern, format and length that are asked for together",
    "oneOf constraints": "the branches of oneOf may be valid together, which cannot be excluded; say anyOf",
    "lookarounds not supported": r"\b is not supported, nor ^ and $ but at the two ends",
    "look-around": "look-ahead and look-behind are not supported",
}

# The first words of every vocabulary: one that no grammar allows, and the end that llguidance asks for.
_NEVER, _END = 0, 1


def json_schema(
    schema: Mapping[str, Any] | str, tokenizer: Tokenizer, *, ends: Iterable[int] | None = None
) -> Callable[[], Constraint]:
    """Answers are one JSON value that is valid under a schema (Draft 2020-12).

    Properties come in the order of the schema. Between tokens of JSON there is at most one space, or a line break
    with at most 16 spaces of indentation.

    Args:
        schema: parsed, or as JSON text.
        ends: tokens that end an answer, allowed only where the value is complete; the tokenizer's when left out.

    Returns:
        what makes a fresh constraint for each answer, cheaply.

    Raises:
        RequestError: what in the schema cannot be followed, and where. MissingExtra: llguidance is not installed.
    """
    words = _vocabulary(tokenizer)
    found = schemas.checked(schema)
    try:
        matcher = words.compiled(_json_grammar(found.root))
    except _Refused as refused:
        raise RequestError(f"json_schema at {_blamed(words, found, str(refused))}: {refused}") from None
    return words.maker(matcher, ends, "json_schema")


def json_object(tokenizer: Tokenizer, *, ends: Iterable[int] | None = None) -> Callable[[], Constraint]:
    """Answers are any JSON object."""
    return json_schema({"type": "object"}, tokenizer, ends=ends)


def regex(pattern: str, tokenizer: Tokenizer, *, ends: Iterable[int] | None = None) -> Callable[[], Constraint]:
    r"""Answers match a regular expression from their beginning to their end.

    The syntax is that of Rust's regex crate, Python's but for what only backtracking can match: there is no
    look-around, no \b and no back-reference; ^ and $ may stand at the two ends only, and \d is 0 to 9.

    Raises:
        RequestError: the pattern is too long, not valid, or needs what is not there.
    """
    words = _vocabulary(tokenizer)
    if not isinstance(pattern, str) or not pattern:
        raise RequestError(f"regex = {pattern!r}: must be a regular expression that is not empty")
    if len(pattern) > _LONGEST_REGEX:
        raise RequestError(f"regex: {len(pattern)} characters are more than the {_LONGEST_REGEX} it may have")
    backslashes = len(pattern) - len(pattern.rstrip("\\"))
    if backslashes % 2:
        raise RequestError("regex: ends in a backslash that escapes nothing; write two")
    _check_unicode("regex", pattern)
    try:
        matcher = words.compiled(_grammar(f"/{_llguidance().regex_to_lark(pattern, 'd')}/"))
    except _Refused as refused:
        raise RequestError(f"regex: {refused}") from None
    return words.maker(matcher, ends, "regex")


def choice(
    texts: Sequence[str], tokenizer: Tokenizer, *, ends: Iterable[int] | None = None
) -> Callable[[], Constraint]:
    """Answers are one of several texts.

    Raises:
        RequestError: there is no text, or too many, or the tokenizer cannot write one of them.
    """
    words = _vocabulary(tokenizer)
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts) or not texts:
        raise RequestError("choice: must be a list of texts, at least one, and none of them empty")
    if len(texts) > _MOST_CHOICES:
        raise RequestError(f"choice: {len(texts)} texts are more than {_MOST_CHOICES}")
    _check_unicode("choice", *texts)
    size = sum(len(text.encode()) for text in texts)
    if size > _LONGEST_CHOICES:
        raise RequestError(f"choice: {size} bytes of text are more than {_LONGEST_CHOICES}")
    for text in texts:
        if not words.writes(text.encode()):
            raise RequestError(f"choice: this model's tokenizer cannot write {text[:80]!r}")
    try:
        matcher = words.compiled(_grammar(" | ".join(json.dumps(text) for text in dict.fromkeys(texts))))
    except _Refused as refused:
        raise RequestError(f"choice: {refused}") from None
    return words.maker(matcher, ends, "choice")


def asked_for(
    options: Mapping[str, Any], tokenizer: Tokenizer, *, ends: Iterable[int] | None = None
) -> Callable[[], Constraint] | None:
    """The constraint that options ask for by its name, or None.

    Raises:
        RequestError: two are asked for, or the one cannot be followed.
    """
    names = [name for name in KINDS if options.get(name) is not None]
    if len(names) > 1:
        raise RequestError(f"{names[1]}: an answer cannot follow {names[0]} as well; leave one out")
    return KINDS[names[0]](options[names[0]], tokenizer, ends=ends) if names else None


KINDS: dict[str, Callable[..., Callable[[], Constraint]]] = {
    "json_schema": json_schema,
    "regex": regex,
    "choice": choice,
}


class GrammarConstraint:
    """Where one answer stands in its grammar.

    End tokens are allowed when the answer may end, and alone when it must. Without any, the constraint is `finished`
    when nothing may follow. It is also finished, but not `complete`, when the tokenizer lacks what would have to
    follow, or following it would take too long.
    """

    def __init__(self, matcher: Any, words: _Vocabulary, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._words = words
        self._ends = list(ends)
        self._spelling = words.first
        self._allowed = np.zeros(max([len(words.later), *(end + 1 for end in ends)]), dtype=np.bool_)
        self._tensor = torch.from_numpy(self._allowed)  # shares its memory
        self._bits = np.zeros((words.size + 31) // 32, dtype=np.int32)
        self._known = False  # whether `_allowed` is that of the present state
        self._finished = False
        self._complete = False

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        self._look()
        return self._finished

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        self._look()
        return self._complete

    def allowed(self) -> Tensor:
        """True where the next token may be: bool (vocab_size,). It is written over after the next `accept`."""
        self._look()
        return self._tensor

    def accept(self, token: int, /) -> None:
        """Follow the token that was chosen, one of those allowed."""
        self._look()
        if self._finished:
            raise RuntimeError(f"token {token} follows a constraint that is finished")
        if token in self._ends:
            self._finished = True
            self._allowed[:] = False
            return
        if not self._allowed[token]:
            raise RuntimeError(f"token {token} is not allowed by the constraint")
        word = int(self._spelling[token])
        self._spelling = self._words.later
        self._known = False
        self._matcher.consume_token(word)

    def _look(self) -> None:
        if self._known:
            return
        self._known = True
        matcher, allowed = self._matcher, self._allowed
        allowed[:] = False
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            words = np.unpackbits(self._bits.view(np.uint8), bitorder="little").view(np.bool_)
            np.take(words, self._spelling, out=allowed[: len(self._spelling)])
        self._complete = bool(matcher.is_accepting()) and not matcher.is_error()
        if matcher.is_error():
            allowed[:] = False
        allowed[self._ends] = self._complete
        self._finished = not allowed.any()


class _Vocabulary:
    """What the tokens of a tokenizer write, as llguidance reads it.

    `first` and `later` give for each token the number of the word it writes at an answer's beginning, and after it.
    Tokens that write the same share a word; special tokens have the word that is never allowed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        firsts, laters = _spellings(tokenizer)
        numbers: dict[bytes, int] = {}
        for spelling in (*laters, *firsts):
            if _wanted(spelling):
                numbers.setdefault(spelling, len(numbers) + 2)
        self.size = len(numbers) + 2
        self.later = np.array([numbers.get(spelling, _NEVER) for spelling in laters], dtype=np.int64)
        self.first = self.later
        if firsts is not laters:
            self.first = np.array([numbers.get(spelling, _NEVER) for spelling in firsts], dtype=np.int64)
        self._firsts = frozenset(filter(_wanted, firsts))
        self._laters = frozenset(filter(_wanted, laters))
        self._longest = max(map(len, numbers), default=0)
        library = _llguidance()
        self._library = library
        self._limits = library.LLParserLimits(**_LIMITS)
        self._tokenizer = library.LLTokenizer(_Words([b"", b"<end>", *numbers]))
        self._compiled: dict[str, Any] = {}
        self._ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def compiled(self, grammar: str) -> Any:
        """A matcher to copy.

        Raises:
            _Refused: llguidance does not take the grammar.
        """
        kept = self._compiled.get(grammar)
        if kept is None:
            kept = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if kept.is_error():
                raise _Refused(_reason(kept.get_error()))
            while len(self._compiled) >= _KEPT:
                self._compiled.pop(next(iter(self._compiled)), None)
            self._compiled[grammar] = kept
        return kept

    def maker(self, matcher: Any, ends: Iterable[int] | None, name: str) -> Callable[[], GrammarConstraint]:
        """Fresh constraints from a compiled matcher, once it is known that one can begin."""
        chosen = self._ends if ends is None else tuple(sorted(set(ends)))

        def fresh() -> GrammarConstraint:
            return GrammarConstraint(matcher.deep_copy(), self, chosen)

        if fresh().finished:
            raise RequestError(f"{name}: nothing that this model's tokenizer can write follows it")
        return fresh

    def writes(self, text: bytes) -> bool:
        """Whether tokens can spell a text exactly, from the beginning of an answer."""
        reached = [False] * len(text)  # after that many bytes
        for end in range(1, min(len(text), self._longest) + 1):
            reached[end - 1] = text[:end] in self._firsts
        for end in range(2, len(text) + 1):
            for begin in range(max(end - self._longest, 1), end):
                if reached[end - 1]:
                    break
                reached[end - 1] = reached[begin - 1] and text[begin:end] in self._laters
        return reached[-1]


class _Words:
    """The tokenizer that llguidance asks for: its words. It encodes nothing, since no grammar here forces tokens."""

    is_tokenizer_wrapper = True
    eos_token_id = _END
    bos_token_id = None
    special_token_ids = (_END,)

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def __call__(self, text: str) -> list[int]:
        return []


class _Refused(Exception):
    """llguidance's reason not to take a grammar."""


_VOCABULARIES: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    found = _VOCABULARIES.get(tokenizer)
    if found is None:
        found = _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
    return found


def _spellings(tokenizer: Tokenizer) -> tuple[list[bytes], list[bytes]]:
    """What each token writes as the first of an answer, and as a later one, as the tokenizer decodes it.

    They differ where a decoder puts spaces between words (WordPiece) or drops the first one (SentencePiece).
    """
    later = list(tokenizer.token_bytes)
    for special in tokenizer.special_ids:
        later[special] = b""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return later, later
    first = list(later)
    bytes_alone = {token for name, token in tokenizer.vocab.items() if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name)}
    words = (token for token, spelling in enumerate(later) if spelling.isalnum() and spelling.isascii())
    before = next((token for token in words if token not in bytes_alone), None)
    tokens = [token for token, spelling in enumerate(later) if spelling]
    beginnings = tokenizer.backend.decode_batch([[token] for token in tokens], skip_special_tokens=False)
    for token, text in zip(tokens, beginnings):
        first[token] = _unless_broken(text, later[token])
    if before is None:
        return first, first
    head = tokenizer.decode([before])
    whole = tokenizer.backend.decode_batch([[before, token] for token in tokens], skip_special_tokens=False)
    for token, text in zip(tokens, whole):
        later[token] = _unless_broken(text.removeprefix(head), later[token]) if text.startswith(head) else b""
    return first, later


def _unless_broken(text: str, spelling: bytes) -> bytes:
    """The text in bytes; a token that is one byte of a character decodes to U+FFFD and stays that byte."""
    return spelling if "\ufffd" in text else text.encode()


def _wanted(spelling: bytes) -> bool:
    """Whether a word can be part of a text: byte 0xFF never is, and marks special tokens in llguidance."""
    return bool(spelling) and b"\xff" not in spelling


def _grammar(start: str) -> str:
    return f'%llguidance {{"no_forcing": true}}\nstart: {start}'


def _json_grammar(schema: Any) -> str:
    whole = {"x-guidance": _JSON_STYLE, **schema}
    return _grammar(f"%json {json.dumps(whole, allow_nan=False)}")


def _blamed(words: _Vocabulary, found: schemas.CheckedSchema, reason: str) -> str:
    """The innermost place of a schema that is refused for the same reason, standing alone."""
    shared = {name: found.root[name] for name in ("$defs", "definitions") if name in found.root}
    for place, part in found.parts[:_MOST_BLAMED]:
        try:
            words.compiled(_json_grammar({**shared, **part}))
        except _Refused as refused:
            if str(refused) == reason:
                return place
    return "#"


def _reason(message: str) -> str:
    """One sentence out of llguidance's report."""
    for mark, meaning in _MEANINGS.items():
        if mark in message:
            return meaning
    error = re.search(r"error: (.*)", message)
    if "regex parse error" in message and error:
        return error[1]
    first = message.split("\n")[0]
    for mark in ("failed to compile JSON schema: ", "(in regex): "):
        first = first.split(mark)[-1]
    return re.sub(r"^at \d+\(\d+\): ", "", first)[:300]


def _check_unicode(name: str, *texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{name}: {text[:80]!r} holds half a surrogate pair, which is no character") from error


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("serve", "constrained output") from None
    return llguidance
