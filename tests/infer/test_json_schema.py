"""JSON answers against jsonschema, and what in a schema is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formary.errors import RequestError
from formary.infer import constrain

from .constrained import followed_or_refused, spelled, tokenizer_of, written

NAMES = st.sampled_from(["a", "name", "年龄", "a b", 'quo"te', "x/y"])


def bounded(low: int, high: int, names: tuple[str, str]) -> st.SearchStrategy[dict[str, int]]:
    pairs = st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted)
    return pairs.map(lambda pair: dict(zip(names, pair)))


LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}, {"const": "猫"}]),
    bounded(-300, 300, ("minimum", "maximum")).map(lambda bounds: {"type": "integer", **bounds}),
    bounded(-30, 30, ("minimum", "maximum")).map(lambda b: {"type": "integer", "multipleOf": 1, **b}),
    bounded(0, 4, ("minLength", "maxLength")).map(lambda bounds: {"type": "string", **bounds}),
    st.sampled_from(["^[ab]{2}c?$", "^\\d{1,3}$", "^(猫|垫子)$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.lists(st.sampled_from([1, "two", None, True, "猫坐在", [1, "x"], {"k": 0}]), min_size=1, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
)


def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(NAMES, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(inner, bounded(0, 3, ("minItems", "maxItems"))).map(
        lambda pair: {"type": "array", "items": pair[0], **pair[1]}
    )
    tuples = st.lists(inner, min_size=1, max_size=2).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches})
    referred = inner.map(lambda part: {"allOf": [part], "title": "a note"})
    return st.one_of(objects, objects, arrays, tuples, either, referred)


SCHEMAS = st.recursive(LEAVES, larger, max_leaves=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS, st.integers(0, 1000))
def test_what_is_written_is_valid_under_its_schema(schema: dict[str, Any], seed: int) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    for made in written("bpe", seed, json_schema=schema):
        if made.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(made.text))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"friend": {"enum": ["猫", "dog"]}},
}


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "characters", "sentencepiece"])
def test_an_object_is_completed_with_any_tokenizer_that_can_write_it(kind: str) -> None:
    for made in written(kind, 3, n=4, json_schema=PERSON):
        assert made.finish_reason == "stop"
        jsonschema.validate(json.loads(made.text), PERSON)


def test_wordpiece_writes_what_its_spaces_allow() -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}
    for made in written("wordpiece", 1, n=4, json_schema=schema):
        assert made.finish_reason == "stop"
        jsonschema.validate(json.loads(made.text), schema)


def test_an_answer_that_a_tokenizer_cannot_go_on_with_is_cut_off() -> None:
    (made,) = written("wordpiece", 1, n=1, json_schema=PERSON)  # a quote and a letter always have a space between
    assert made.finish_reason == "length" and len(made.tokens) < 400


def test_any_object_may_be_asked_for() -> None:
    ended = [made for made in written("bpe", 5, n=12, json_schema={"type": "object"}) if made.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(made.text), dict) for made in ended)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ('{"a":1,"b":[2,3]}', True),
        ('{ "a" : 1, "b" : [ 2, 3 ] }', True),
        ('{\n  "a": 1,\n  "b": [\n    2,\n    3\n  ]\n}', True),
        ('{  "a":1}', False),
        ('{\n\n"a":1}', False),
        ('{\t"a":1}', False),
        (' {"a":1}', False),
        ('{"a":1}\n', False),
        (f'{{\n{" " * 17}"a":1}}', False),
        ('{"猫":"坐在垫子上"}', True),
        ('{"a":"\\n\\"\\\\"}', True),
        ('{"\\u0061":1}', False),
        ('{"a":"\n"}', False),
    ],
)
def test_whitespace_is_one_space_or_an_indented_line(text: str, fine: bool) -> None:
    assert spelled(constrain.json_object(tokenizer_of("bytes")), text) == fine


def test_a_schema_may_be_text() -> None:
    maker = constrain.json_schema('{"type": "integer", "minimum": 10, "maximum": 12}', tokenizer_of("bytes"))
    assert [spelled(maker, str(value)) for value in range(8, 15)] == [False, False, True, True, True, False, False]


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {}}, ["#:", "'not'"]),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, ["#/properties/a/items", "'uniqueItems'"]),
        ({"requried": ["a"]}, ["requried", "did you mean 'required'"]),
        ({"x-guidance": {"lenient": True}}, ["x-guidance"]),
        ({"properties": {"a": {"format": "zip"}}}, ["#/properties/a/format", "zip"]),
        ({"anyOf": [{"pattern": "a(?=b)"}]}, ["#/anyOf/0", "look-ahead"]),
        ({"properties": {"b": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, ["#/properties/b", "anyOf"]),
        ({"$ref": "https://example.org/schema"}, ["#/$ref", "point into this schema"]),
        ({"$ref": "#/$defs/nobody"}, ["/$defs/nobody"]),
        ({"anyOf": [{"minimum": 3, "maximum": 1, "type": "integer"}]}, ["#/anyOf/0", "minimum (3)"]),
        ({"items": [{"type": "integer"}]}, ["#/items", "prefixItems"]),
        ({"type": "whole"}, ["whole"]),
        ({"minLength": -1}, ["#/minLength", "-1"]),
        ({"maxItems": 10**9}, ["#/maxItems"]),
        ({"minimum": True}, ["#/minimum"]),
        ({"type": "integer", "multipleOf": 300_007}, ["#/multipleOf", "300007"]),
        ({"anyOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, ["multipleOf (991, 997)"]),
        ({"allOf": [{"pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(20)]}, ["#", "20 patterns"]),
        ({"required": "a"}, ["#/required", "list"]),
        ({"minProperties": 2}, ["#/minProperties", "required"]),
        ({"const": "a\x01"}, ["#/const", "control character"]),
        ({"properties": []}, ["#/properties"]),
        ({"anyOf": []}, ["#/anyOf"]),
        ({"items": 3}, ["#/items", "int"]),
        ({"const": math.nan}, ["JSON"]),
        ({"enum": [f"value {n}" for n in range(9_000)]}, ["bytes", "65536"]),
        (nested(40), ["nested", "32"]),
        ('{"type": ', ["not JSON"]),
        ("[" * 60_000, ["not JSON"]),
        ("[1]", ["list"]),
        (7, ["int"]),
    ],
)
def test_what_in_a_schema_cannot_be_followed_is_named_with_its_place(schema: Any, said: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        constrain.json_schema(schema, tokenizer_of("bytes"))
    assert all(words in str(caught.value) for words in ["json_schema", *said])


def test_notes_do_not_restrict() -> None:
    notes = {"title": "x", "description": "y", "default": 1, "examples": [2], "$schema": "any", "x-order": 3}
    assert spelled(constrain.json_schema({"type": "boolean", **notes}, tokenizer_of("bytes")), "true")


def layered(layers: int) -> dict[str, Any]:
    """Each definition joins the next with itself: 2 ** layers parts if they were written out."""
    parts: dict[str, Any] = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(layers)}
    return {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{layers}": {"type": "string", "pattern": "(a|b)*a(a|b){9}"}}}


@pytest.mark.parametrize(
    "schema",
    [
        layered(30),
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"allOf": [{"anyOf": [{"required": [f"a{i}{j}"]} for j in range(5)]} for i in range(8)]},
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1_500)}},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
        {"type": "string", "pattern": "^(\\w{1,50}\\d{1,50}){1,50}$", "maxLength": 30},
        {"patternProperties": {f"^(a|b)*a(a|b){{{n}}}$": {} for n in range(20)}},
    ],
    ids=["layers", "itself", "circle", "product", "many", "long", "counts", "patterns"],
)
def test_a_hostile_schema_is_refused_or_followed(schema: dict[str, Any]) -> None:
    followed_or_refused(lambda: constrain.json_schema(schema, tokenizer_of("bpe")))
