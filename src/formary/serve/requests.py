"""The bodies that clients send, as types: every field that is followed, with its bounds, and nothing else.

What OpenAI has and this server does not is named in `unfollowed` with the values that ask for nothing; any other value
is refused by name, and so is a field that nobody knows. How a body becomes work is not known here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from formary.errors import nearest
from formary.serve import limits
from formary.serve.calling import as_templates_read
from formary.serve.errors import ApiError

Prompt = str | tuple[int, ...]


class Body(BaseModel):
    """A JSON object whose fields are all known; numbers are finite, true is no number and "1" neither."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unfollowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)] | None = Field(
        None, description="A model's id, as /v1/models lists them; not needed where one model is served."
    )


def _prompts(value: Any) -> list[Prompt]:
    """OpenAI's four forms of a prompt: a text, texts, a list of tokens, lists of tokens."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("is empty")
    if _are_tokens(value):
        return [tuple(value)]
    if len(value) > limits.PROMPTS:
        raise ValueError(f"holds {len(value)} prompts; at most {limits.PROMPTS} in one request")
    if all(isinstance(entry, str) for entry in value):
        return list(value)
    if all(isinstance(entry, list) and entry and _are_tokens(entry) for entry in value):
        return [tuple(entry) for entry in value]
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists (not mixed)")


def _are_tokens(value: list[Any]) -> bool:
    return all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 2**31 for entry in value)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a text or a list of texts")
    if len(stops) > limits.STOPS:
        raise ValueError(f"holds {len(stops)} texts; at most {limits.STOPS}")
    if any(not stop or len(stop) > limits.STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each text must have 1 to {limits.STOP_CHARACTERS} characters")
    return stops


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    if len(value) > limits.LOGIT_BIAS:
        raise ValueError(f"holds {len(value)} tokens; at most {limits.LOGIT_BIAS}")
    biases: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise ValueError(f"{token[:40]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the number for token {token} must be from -100 to 100")
        biases[int(token)] = float(bias)
    return biases


_TEXT_OR_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_FOUR_FORMS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": limits.PROMPTS},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": limits.PROMPTS},
    ]
}
Prompts = Annotated[list[Prompt], BeforeValidator(_prompts), WithJsonSchema(_FOUR_FORMS)]
Stops = Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_TEXT_OR_TEXTS)]
Biases = Annotated[
    dict[int, float],
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
                {"type": "null"},
            ]
        }
    ),
]


def _bounded_schema(value: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(value)) > limits.SCHEMA_BYTES:
        raise ValueError(f"is longer than {limits.SCHEMA_BYTES} bytes")
    return value


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="One more chunk at the end, with the counts of tokens.")
    include_obfuscation: Literal[False] | None = None


class JsonSchema(BaseModel):
    """A schema that the answer has to follow."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(_bounded_schema)] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer: free text, any JSON object, or JSON by a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema belong together")
        return self


class Writing(Body):
    """The fields that say how text is written; what is left out is as the model's generation_config.json says."""

    max_tokens: Annotated[int, Field(ge=0, le=limits.MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(None, description="0 and -1 keep every token.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="Drawn anew when left out.")
    stop: Stops = Field(default_factory=list)
    ignore_eos: bool | None = Field(None, description="Write on after the token that ends an answer.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1, max_length=limits.PATTERN_CHARACTERS)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=limits.PATTERN_CHARACTERS)]],
            Field(min_length=1, max_length=limits.CHOICE_TEXTS),
        ]
        | None
    ) = Field(None, description="The answer is one of these texts.")
    speculate: bool | None = Field(None, description="Guess several tokens at once; changes the speed only.")
    user: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)] | None = Field(None, description="Not used.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only goes with stream: true")
        formats = [self.response_format is not None and self.response_format.type != "text", self.regex, self.choice]
        if sum(map(bool, formats)) > 1:
            raise ValueError("response_format: give one of response_format, regex and choice")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options of `Model.generate` that are given; the model's own defaults hold for the others."""
        names = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")
        given: dict[str, Any] = {name: getattr(self, name) for name in (*names, "frequency_penalty")}
        given = {name: value for name, value in given.items() if value is not None}
        if self.top_k is not None:
            given["top_k"] = self.top_k if self.top_k > 0 else None
        return given | {"logit_bias": self.logit_bias, "stop": self.stop}


class CompletionRequest(Writing):
    """Go on from a prompt (a decoder), or answer a source text (an encoder-decoder)."""

    unfollowed = {"suffix": ("",)}

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=0, le=limits.N)] | None = Field(None, description="1 or as many as n.")

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.best_of not in (None, 1, self.n or 1):
            raise ValueError("best_of: is not implemented; leave it out, or give it the value of n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 writes nothing; with echo: true it scores the prompt")
        return self


def _content(value: Any) -> str | None:
    """A message's content: a text, or OpenAI's parts of type text, which are joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts")
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} must be of type text; these models read nothing else")
        texts.append(part["text"])
    return "".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Content = Annotated[
    str | None,
    BeforeValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}),
]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=limits.TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)] | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates read it: OpenAI's new name for system is the old one, and nothing empty but the content."""
        role = "system" if self.role == "developer" else self.role
        given = {name: getattr(self, name) for name in ("name", "tool_calls", "tool_call_id")}
        if self.tool_calls is not None:
            given["tool_calls"] = as_templates_read(self.tool_calls)
        content = self.content if self.content is not None or self.tool_calls else ""
        return {"role": role, "content": content} | {k: v for k, v in given.items() if v is not None}


class Function(BaseModel):
    """What a tool is called and takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_bounded_schema)] | None = None
    strict: bool | None = Field(None, description="True goes with a tool_choice that makes the model call a tool.")


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name of a tool."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)]


class NamedTool(BaseModel):
    """The one tool that has to be called."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: NamedFunction


def _tools(value: Any) -> Any:
    """Tools as they were sent, once each is known to be one: templates write them as they are."""
    for number, entry in enumerate(value if isinstance(value, list) else ()):
        try:
            Tool.model_validate(entry)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            message = str(first["msg"]).removeprefix("Value error, ")
            raise ValueError(f"tool {number}: {_place(first['loc'])}: {message}") from None
    return value


Messages = Annotated[list[Message], Field(min_length=1, max_length=limits.MESSAGES)]
_TOOL = Tool.model_json_schema()
_TOOL["properties"]["function"] = _TOOL.pop("$defs")["Function"]
Tools = Annotated[
    list[dict[str, Any]],
    AfterValidator(_tools),
    Field(max_length=limits.TOOLS),
    WithJsonSchema({"type": "array", "items": _TOOL, "maxItems": limits.TOOLS}),
]


class ChatRequest(Writing):
    """The assistant's next message in a conversation."""

    unfollowed = {
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "safety_identifier": (),
        "moderation": (),
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    tools: Tools | None = Field(None, description="Written into the prompt where the model's chat template has them.")
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="With false there is at most one call.")

    @model_validator(mode="after")
    def _can_be_chatted(self) -> Self:
        if self.max_tokens == 0:
            raise ValueError("max_tokens: must be at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only goes with logprobs: true")
        if self.forced_tools is not None:
            if not self.forced_tools:
                which = f"'{self.tool_choice.function.name}' " if isinstance(self.tool_choice, NamedTool) else ""
                raise ValueError(f"tool_choice: there is no tool {which}among tools to be called")
            if self.regex or self.choice or (self.response_format and self.response_format.type != "text"):
                raise ValueError(
                    "tool_choice: an answer that calls a tool has no other form; say auto, or leave that out"
                )
        elif any(tool["function"].get("strict") for tool in self.offered_tools):
            raise ValueError(
                "tools: strict is followed where tool_choice is required or names a function; leave it out"
            )
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[dict[str, Any]] | None:
        """The tools of which it must call one; None where it may also write text."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered_tools if tool["function"]["name"] == name][:1]
        return self.offered_tools if self.tool_choice == "required" else None


class EmbeddingRequest(Body):
    """Vectors of texts."""

    unfollowed = {"dimensions": ()}

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str, Field(max_length=limits.NAME_CHARACTERS)] | None = None


class PredictRequest(BaseModel):
    """Rows for a model with a task: texts, pictures, or objects with the task's columns."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unfollowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    inputs: Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=limits.PROMPTS)] = Field(
        description="Texts, or objects with the task's columns. A picture is sent as its content, "
        "data:image/png;base64,... or data:image/jpeg;base64,...; paths are refused.",
        examples=[["a text"], [{"question": "Who?", "context": "..."}], ["data:image/png;base64,iVBORw0KGgo..."]],
    )
    beams: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="For tasks that write.")
    max_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)] | None = Field(
        None, description="For tasks that write."
    )
    k: Annotated[int, Field(ge=1, le=limits.LISTED)] | None = Field(
        None, description="For tasks that recommend: how many items; 10 if unsaid."
    )
    exclude_seen: bool | None = Field(
        None, description="For tasks that recommend: leave out the items of the history; as trained if unsaid."
    )


class TokenizeRequest(Body):
    """The tokens of a text or of a conversation, as the model reads them."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = Field(None, description="Those the tokenizer puts around a text; true if unsaid.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The text of tokens."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=limits.MAX_TOKENS)]


B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], raw: bytes) -> B:
    """A body as its type.

    Raises:
        ApiError: it is not JSON, has a field that is unknown or not followed, or a value out of bounds; the field is
            named.
    """
    values = _json(raw)
    unfollowed: Mapping[str, tuple[Any, ...]] = getattr(kind, "unfollowed", {})
    for name in unfollowed.keys() & values.keys():
        value = values.pop(name)
        if value is not None and not any(type(value) is type(n) and value == n for n in unfollowed[name]):
            raise ApiError(400, f"{name}: is not implemented here; leave it out", param=name, code="unsupported_field")
    known = {field.alias or name for name, field in kind.model_fields.items()}
    for name in values:
        if name not in known:
            hint = nearest(name[:80], known)
            message = f"{name[:80]}: there is no such field{'; ' + hint if hint else ''}"
            raise ApiError(400, message, param=name[:80], code="unknown_field")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _told(error) from None


def _json(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in raw:
            json.dumps(values, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # not UTF-8, not JSON, NaN, a number of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; numbers must be finite")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_constant(digits[:40])


def _told(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by the name of its field."""
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = _place(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if not place:
        place, _, message = message.partition(": ")
    return ApiError(400, f"{place}: {message}", param=place, code="invalid_value")


_BRANCHES = {"str", "int", "float", "bool", "dict", "list", "NamedTool"}


def _place(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in _BRANCHES:  # names that pydantic gives the branches of a union
            text += f".{part}" if text else part
    return text
