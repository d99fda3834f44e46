"""Which JSON schemas an answer can be made to follow: the keywords that hold, and bounds on what strangers may send.

A schema is checked whole before it is compiled, so that nothing in it is silently ignored and nothing takes long.
It builds no grammars and knows no tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NoReturn

from formary.errors import RequestError, nearest

MOST_BYTES = 64 * 1024
_MOST_DEPTH = 32
_MOST_SCHEMAS = 2_000
_MOST_COUNT = 100_000  # of items, characters, properties
_LONGEST_PATTERN = 1_000
_MOST_PATTERNS = 50  # in one patternProperties, which must be compared pairwise
_MOST_JOINED = 4  # patterns that one text must match at once: their product can be exponential
_LARGEST_MULTIPLE = 10_000  # as a whole number: an automaton has a state for each remainder
_MOST = 10**9  # where counting what is joined stops

_SCHEMA = ("items", "additionalProperties")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_PLAIN = ("type", "const", "enum", "required", "pattern", "format", "$ref", *_COUNTS, *_BOUNDS)
_NOTES: tuple[str, ...] = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
_NOTES += ("$schema", "$id", "$comment", "discriminator")  # none of these says which values are valid
KEYWORDS = (*_SCHEMA, *_SCHEMAS, *_NAMED, *_PLAIN)
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_LOCAL = ("$defs", "definitions")
_WITHOUT_ESCAPE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class CheckedSchema:
    """A schema without its annotations.

    Args:
        root: as it can be compiled.
        parts: every schema in it that stands alone, by its place ("#/properties/name"), inner ones first.
    """

    root: Any
    parts: tuple[tuple[str, Any], ...]


def checked(schema: Mapping[str, Any] | str, name: str = "json_schema") -> CheckedSchema:
    """Read and check a schema.

    Args:
        schema: parsed, or as JSON text.
        name: what error messages call it.

    Raises:
        RequestError: it is no schema, or too large, or has a keyword that cannot be followed; the message names both
            keyword and place.
    """
    if isinstance(schema, str):
        if len(schema) > MOST_BYTES:
            raise RequestError(f"{name}: {len(schema)} characters are more than the {MOST_BYTES} that are read")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name}: is not JSON ({error or 'nested too deeply'})") from error
    if not isinstance(schema, Mapping):
        raise RequestError(f"{name}: must be a JSON schema such as {{'type': 'object'}}, not {_kind(schema)}")
    try:
        size = len(json.dumps(schema, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: cannot be written as JSON ({error})") from error
    if size > MOST_BYTES:
        raise RequestError(f"{name}: {size} bytes of JSON are more than the {MOST_BYTES} that are read")
    check = _Check(name)
    root = check.schema(schema, "#", 0)
    _Joins(name, root).check(check.parts)
    multiples = {part["multipleOf"] for _, part in check.parts if "multipleOf" in part}
    if math.lcm(*map(_whole, multiples)) > _LARGEST_MULTIPLE:
        raise RequestError(
            f"{name}: the values of multipleOf ({', '.join(map(str, sorted(multiples)))}) have a common multiple, "
            f"without their decimal points, of more than {_LARGEST_MULTIPLE}; leave some out"
        )
    return CheckedSchema(root, tuple(check.parts))


@dataclass
class _Check:
    """Walks a schema, keeping what restricts values and refusing what cannot be followed."""

    name: str
    parts: list[tuple[str, Any]] = field(default_factory=list)

    def schema(self, schema: Any, place: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            self._refuse(place, f"must be a schema (an object, true or false), not {_kind(schema)}")
        if depth > _MOST_DEPTH:
            self._refuse(place, f"schemas are nested more than {_MOST_DEPTH} deep; use $ref for what repeats")
        kept: dict[str, Any] = {}
        for keyword, value in schema.items():
            here = f"{place}/{keyword}"
            if keyword in _NOTES or (keyword.startswith("x-") and keyword != "x-guidance"):
                continue
            if keyword in _SCHEMA:
                kept[keyword] = self._one(value, here, depth)
            elif keyword in _SCHEMAS:
                kept[keyword] = [self.schema(part, f"{here}/{i}", depth + 1) for i, part in self._list(value, here)]
            elif keyword in _NAMED:
                kept[keyword] = self._named(keyword, value, here, depth)
            elif keyword in _PLAIN:
                self._plain(keyword, value, here)
                kept[keyword] = value
            else:
                hint = nearest(keyword, KEYWORDS) or f"known are {', '.join(sorted(KEYWORDS))}"
                self._refuse(place, f"keyword '{keyword}' cannot be followed; {hint}")
        self._properties(kept, place)
        self.parts.append((place, kept))
        if len(self.parts) > _MOST_SCHEMAS:
            self._refuse(place, f"holds more than {_MOST_SCHEMAS} schemas")
        return kept

    def _one(self, value: Any, place: str, depth: int) -> Any:
        if isinstance(value, list):
            self._refuse(place, "a list is the old form; say prefixItems")
        return self.schema(value, place, depth + 1)

    def _list(self, value: Any, place: str) -> Iterator[tuple[int, Any]]:
        if not isinstance(value, list) or not value:
            self._refuse(place, "must be a list of schemas, at least one")
        return iter(enumerate(value))

    def _named(self, keyword: str, value: Any, place: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self._refuse(place, f"must map names to schemas, not {_kind(value)}")
        if keyword == "patternProperties":
            if len(value) > _MOST_PATTERNS:
                self._refuse(place, f"{len(value)} patterns are more than {_MOST_PATTERNS}")
            for pattern in value:
                self._pattern(pattern, place)
        if keyword == "properties":
            self._writable(value, place)
        return {part: self.schema(inner, f"{place}/{part}", depth + 1) for part, inner in value.items()}

    def _plain(self, keyword: str, value: Any, place: str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if keyword in _COUNTS and not (number and value == int(value) and 0 <= value <= _MOST_COUNT):
            self._refuse(place, f"{_short(value)} must be a whole number from 0 to {_MOST_COUNT}")
        if keyword in _BOUNDS and not (number and abs(value) < 2**63):
            self._refuse(place, f"{_short(value)} must be a number of less than 2**63")
        if keyword == "multipleOf" and not 0 < _whole(value) <= _LARGEST_MULTIPLE:
            self._refuse(
                place, f"{_short(value)} must be above 0 and, without its decimal point, at most {_LARGEST_MULTIPLE}"
            )
        if keyword == "pattern":
            self._pattern(value, place)
        if keyword == "format" and value not in _FORMATS:
            self._refuse(place, f"{_short(value)} is not known; known are {', '.join(_FORMATS)}")
        if keyword == "$ref" and not (isinstance(value, str) and re.match(r"#(/|$)", value)):
            self._refuse(place, f"{_short(value)} must point into this schema, such as #/$defs/name")
        if keyword == "required":
            if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
                self._refuse(place, "must be a list of names")
            self._writable(value, place)
        if keyword == "enum" and (not isinstance(value, list) or not value):
            self._refuse(place, "must be a list of values, at least one")
        if keyword in ("const", "enum"):
            self._writable(_strings(value), place)

    def _pattern(self, value: Any, place: str) -> None:
        if not isinstance(value, str):
            self._refuse(place, f"must be a regular expression, not {_kind(value)}")
        if len(value) > _LONGEST_PATTERN:
            self._refuse(place, f"{len(value)} characters are more than the {_LONGEST_PATTERN} a pattern may have")

    def _writable(self, texts: Iterable[str], place: str) -> None:
        for text in texts:
            if _WITHOUT_ESCAPE.search(text):
                self._refuse(place, f"{_short(text)} has a control character that answers never hold")

    def _properties(self, schema: Mapping[str, Any], place: str) -> None:
        least = schema.get("minProperties", 0)
        if least > max(1, len(set(schema.get("required", ())))):
            self._refuse(
                f"{place}/minProperties",
                f"{least} cannot be promised, because names of additional properties may repeat; list them as required",
            )

    def _refuse(self, place: str, why: str) -> NoReturn:
        raise RequestError(f"{self.name} at {place}: {why}")


class _Joins:
    """Bounds the patterns that one text must match, where allOf, or a $ref or anyOf with neighbours, joins schemas.

    Counted are all patterns below, since joining objects joins their properties as well; of anyOf the largest branch.
    """

    def __init__(self, name: str, root: Any) -> None:
        self._name = name
        self._root = root
        self._known: dict[int, int] = {}

    def check(self, parts: Iterable[tuple[str, Any]]) -> None:
        for place, schema in parts:
            patterns = self._patterns(schema) if _joins(schema) else 0
            if patterns > _MOST_JOINED:
                raise RequestError(
                    f"{self._name} at {place}: joins {patterns} patterns or formats, more than {_MOST_JOINED}"
                )

    def _patterns(self, schema: Any) -> int:
        """Patterns and formats in a schema and all below it."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) in self._known:
            return self._known[id(schema)]
        self._known[id(schema)] = 0  # a circle adds nothing more
        found = ("pattern" in schema) + ("format" in schema) + len(schema.get("patternProperties", ()))
        found += sum(self._patterns(schema[keyword]) for keyword in _SCHEMA if keyword in schema)
        for keyword in ("allOf", "prefixItems"):
            found += sum(map(self._patterns, schema.get(keyword, ())))
        for keyword in ("properties", "patternProperties"):
            found += sum(map(self._patterns, schema.get(keyword, {}).values()))
        for keyword in ("anyOf", "oneOf"):
            found += max(map(self._patterns, schema.get(keyword, ())), default=0)
        if "$ref" in schema:
            found += self._patterns(_target(self._root, schema["$ref"]))
        self._known[id(schema)] = min(found, _MOST)
        return self._known[id(schema)]


def _joins(schema: Mapping[str, Any]) -> bool:
    sources = sum(
        len(schema[keyword]) if keyword == "allOf" else 1
        for keyword in ("allOf", "anyOf", "oneOf", "$ref")
        if keyword in schema
    )
    plain = any(keyword not in ("allOf", "anyOf", "oneOf", "$ref", *_LOCAL) for keyword in schema)
    return sources > 1 or bool(sources and plain)


def _target(root: Any, pointer: str) -> Any:
    """What a $ref points to; None where there is nothing (the compiler says so)."""
    found = root
    for step in pointer.removeprefix("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(step)
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def _whole(multiple: float) -> int:
    """A multiple without its decimal point: 0.25 is 25."""
    value = Fraction(repr(multiple))
    scale = 1
    while (value * scale).denominator != 1:
        scale *= 10
    return int(value * scale)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
