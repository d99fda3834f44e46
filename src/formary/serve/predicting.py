"""Rows for a model's task and texts for its vectors: split into jobs, answered with whatever else waits, put together.

Where a task writes, each row is a request to the model's engine like any other; the rest is answered in batches.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from formary.data.images import is_data_uri
from formary.errors import DataError, FormaryError
from formary.infer.answers import rows_of, writer_of, writing, written_answer
from formary.infer.engine import Event, Request
from formary.serve import limits
from formary.serve.errors import ApiError, refusal
from formary.serve.requests import EmbeddingRequest, PredictRequest
from formary.serve.responses import dumps, usage
from formary.serve.service import Served
from formary.serve.worker import MOST_ROWS, Job, Mailbox
from formary.tasks.pictures import SENT
from formary.tasks.protocol import LabelledTask, WritingTask

_ROW = re.compile(r"\brow (\d+)")
_BYTES_PER_TOKEN = 3
_OPTIONS = {"texts": ("beams", "max_tokens"), "ranking": ("k", "exclude_seen")}  # by the kind of answers they go with


async def predicted(served: Served, body: PredictRequest, key: str) -> dict[str, Any]:
    """The answers of a model's task to rows.

    Raises:
        ApiError: a row or an option is not as the task needs it.
    """
    served.must("predict")
    files = served.model.task.form.files if served.task is not None else ()
    _check_lengths(body.inputs, "inputs", served.model.task.asks[:1] if files else (), files)
    options = {
        name: getattr(body, name) for names in _OPTIONS.values() for name in names if getattr(body, name) is not None
    }
    kind = served.model.task.answers if served.task is not None else ""
    written = kind == "texts"
    if other := next((name for name in options if name not in _OPTIONS.get(kind, ())), None):
        does = "write" if other in _OPTIONS["texts"] else "recommend"
        raise ApiError(400, f"{other}: this model's task does not {does}", param=other, code="unsupported_field")
    if served.task is None:
        if wrong := next((n for n, row in enumerate(body.inputs) if not isinstance(row, str)), None) is not None:
            raise ApiError(400, f"inputs[{wrong}]: must be a text with [MASK]", param=f"inputs[{wrong}]")
        options["fill"] = True
    rows: Sequence[Any] = body.inputs
    if files:
        rows = await asyncio.to_thread(_with_files, served.model.task, rows)
    if written and (body.beams or 1) == 1:
        answers = await _written(served, rows, body.max_tokens, key)
    else:
        answers = await _answers(served, rows, options, key)
    return {"object": "list", "model": served.name, "task": served.task or "fill", "answers": answers}


async def embedded(served: Served, body: EmbeddingRequest, key: str) -> dict[str, Any]:
    """The vectors of texts, in OpenAI's shape.

    Raises:
        ApiError: the model has none, or tokens are given instead of texts.
    """
    served.must("embeddings")
    texts = [text for text in body.input if isinstance(text, str)]
    if len(texts) < len(body.input):
        raise ApiError(400, "input: send texts; this model reads them with its own tokens", param="input")
    _check_lengths(texts, "input")
    if not all(text.strip() for text in texts):
        raise ApiError(400, "input: a text is empty", param="input", code="invalid_value")
    answers = await _answers(served, texts, {}, key)
    read = sum(min(len(tokens), served.worker.context) for tokens in served.model.tokenizer.encode_batch(texts))
    data = [
        {
            "object": "embedding",
            "index": number,
            "embedding": _coded(answer.get("vector") or answer["text_vector"], body.encoding_format),
        }
        for number, answer in enumerate(answers)
    ]
    return {"object": "list", "data": data, "model": served.name, "usage": _usage(read)}


def _with_files(task: LabelledTask, inputs: Sequence[Any]) -> list[Any]:
    """Rows whose files were sent in them, each decoded once and made small before it waits; no path is followed.

    Raises:
        ApiError: one is a path, is broken, or unpacks to far more than was sent; it is named.
    """
    rows, reader = rows_of(task, inputs), getattr(task, "pictures", None)
    for column in task.form.files:
        sending = [n for n, row in enumerate(rows) if column in task.asks or row.get(column) is not None]
        places = [f"inputs[{number}]: {column}" for number in sending]
        values = [rows[number].get(column) for number in sending]
        try:
            if reader is None and sending:
                raise DataError(f"{places[0]}: files cannot be sent to task {task.name}")
            sent = reader.received(values, places, most_pixels=limits.PIXELS) if reader else []
        except DataError as error:
            named = str(error).partition(":")[0]
            raise ApiError(400, str(error), param=named, code="invalid_value") from error
        for number, (value, size) in zip(sending, sent, strict=True):
            rows[number] = {**rows[number], column: value, SENT: size}
    return list(rows)


def _check_lengths(rows: Sequence[Any], field: str, first: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """Refuse what is too long; files in it are not counted, for them there are other bounds.

    Args:
        first: the column that a plain text stands for, where that may hold a file.
        files: columns that hold files.
    """
    for number, row in enumerate(rows):
        if isinstance(row, str):
            length = 0 if set(first) & set(files) or (files and is_data_uri(row)) else len(row)
        else:
            length = len(dumps({name: value for name, value in row.items() if name not in files}))
        if length > limits.ROW_CHARACTERS:
            message = f"{field}[{number}]: {length} characters are more than {limits.ROW_CHARACTERS}; cut it"
            raise ApiError(400, message, param=f"{field}[{number}]", code="invalid_value")


async def _answers(served: Served, rows: Sequence[Any], options: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The task's answers to rows, a few at a time; by beam search one at a time."""
    mailbox, most = Mailbox(), 1 if options.get("beams", 1) > 1 else MOST_ROWS
    jobs = [
        Job(key, _cost(rows[first : first + most]), mailbox, place, rows=rows[first : first + most], options=options)
        for place, first in enumerate(range(0, len(rows), most))
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    with served.worker.running(jobs):
        while len(found) < len(jobs):
            for place, item in await mailbox.get():
                if isinstance(item, FormaryError):
                    # The worker counts the rows of a job; the client those of its request.
                    refused = refusal(item)
                    refused.message = _ROW.sub(lambda m: f"row {int(m[1]) + place * most}", refused.message)  # noqa: B023
                    raise refused
                if isinstance(item, Exception):
                    raise item
                assert isinstance(item, list)
                found[place] = item
    return [answer for place in range(len(jobs)) for answer in found[place]]


async def _written(served: Served, rows: Sequence[Any], most: int | None, key: str) -> list[dict[str, Any]]:
    """The answers that a task writes, each as a request of its own to the model's engine."""
    task = served.model.task
    assert isinstance(task, WritingTask)
    requests = await asyncio.to_thread(_requests, served, task, rows, most)
    mailbox = Mailbox()
    jobs = [
        Job(key, len(request.prompt) + min(request.max_tokens, served.worker.context), mailbox, place, request)
        for place, request in enumerate(requests)
    ]
    tokens: list[list[int]] = [[] for _ in jobs]
    with served.worker.running(jobs):
        left = len(jobs)
        while left:
            for place, item in await mailbox.get():
                if isinstance(item, FormaryError):
                    refused = refusal(item)
                    refused.message, refused.param = f"row {place + 1}: {refused.message}", f"inputs[{place}]"
                    raise refused
                if isinstance(item, Exception):
                    raise item
                assert isinstance(item, Event)
                tokens[place].append(item.token)
                left -= item.finish is not None
    return [written_answer(task, row, written) for row, written in zip(rows_of(task, rows), tokens)]


def _requests(served: Served, task: WritingTask, rows: Sequence[Any], most: int | None) -> list[Request]:
    writer, given = writer_of(task, served.model.network), rows_of(task, rows)
    prompts = [task.prompt(row, f"row {number}") for number, row in enumerate(given, 1)]
    options = [writing(task, row, {"max_tokens": most}) for row in given]
    return [writer.request(prompt, 1, its)[0] for prompt, its in zip(prompts, options)]


def _cost(rows: Sequence[Any]) -> int:
    return sum(max(len(str(row).encode()) // _BYTES_PER_TOKEN, 1) for row in rows)


def _coded(vector: Sequence[float], form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
    return vector


def _usage(read: int) -> dict[str, Any]:
    return {name: usage(read, 0)[name] for name in ("prompt_tokens", "total_tokens")}
