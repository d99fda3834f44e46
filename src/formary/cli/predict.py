"""The commands that let models answer rows: predict writes the answers, compare says which of two models is better."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from formary.errors import FormaryError

Columns = Annotated[
    list[str] | None, typer.Option("--column", metavar="OURS=YOURS", help="Another column's name, e.g. text=body.")
]


def predict(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id.")],
    input: Annotated[
        str,
        typer.Argument(
            help="A file of rows, a text in quotes, a picture or a folder of them, or - for lines of standard input."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write JSONL here: each row with its answer; boxes to a .json file as COCO has results."),
    ] = None,
    column: Columns = None,
    beams: Annotated[int | None, typer.Option(min=1, help="For tasks that write: width of the beam search.")] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            help="Of match_image_text: a text that may belong to a picture; give several, the likeliest is told."
        ),
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Of match_image_text: the pictures in the order in which they match."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print whole answers as JSON, one a line.")] = False,
) -> None:
    """Answer rows with a fine-tuned model: labels, tags, answers in a text, translations, what is on pictures."""
    from formary.durable import write_json
    from formary.infer.loaded import load
    from formary.pipeline.measure import rows_for, write_answers
    from formary.pipeline.telling import forecast_lines

    loaded = load(model, precision="int8" if precision == "int8" else "float32")
    task = loaded.task
    rows, left_out = rows_for(task, input, columns=mapping(column), answers=False)
    if candidate or find is not None:
        if not hasattr(task, "zero_shot"):
            raise FormaryError("--candidate and --find are for models of task match_image_text; leave them out")
        rows = [{**row, **({"text": find} if find is not None else {"candidates": candidate})} for row in rows]
    options: dict[str, Any] = {"beams": beams} if beams else {}
    answers = loaded.predict(rows, precision="float32" if precision == "int8" else precision, **options)
    if find is not None:
        order = sorted(range(len(rows)), key=lambda number: -answers[number]["similarity"])
        rows, answers = [rows[number] for number in order], [answers[number] for number in order]
    for note in (*left_out, *loaded.task.notes()):
        print(f"note: {note}", file=sys.stderr)
    if out:
        if out.suffix == ".json" and hasattr(task, "results"):
            write_json(out, task.results(rows, answers))
        else:
            write_answers(out, rows, answers)
        print(f"{len(answers):,} answers written to {out}")
        return
    for row, answer in zip(rows, answers):
        if "forecasts" in answer and not json:
            print("\n".join(forecast_lines(answer)))
            continue
        print(json_format.dumps(answer, ensure_ascii=False) if json else _line(task, row, answer))


def compare(
    model_a: Annotated[str, typer.Argument(help="A model folder (also another library's) or a hub id.")],
    model_b: Annotated[str, typer.Argument(help="The model to compare it with.")],
    data: Annotated[str, typer.Argument(help="Rows with the right answers.")],
    column: Columns = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure two models on the same rows: better, worse, or cannot tell, by paired 95 % intervals."""
    from formary.pipeline.measure import compare as measure

    console = None if json else Console(stderr=True)
    result = measure(model_a, model_b, data, columns=mapping(column), console=console)
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    print(f"measured on: {result['metrics'][0]['protocol']}\nA = {model_a}\nB = {model_b}")
    for metric in result["metrics"]:
        print(f"  A: {metric['says']}")
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"by {result['metrics'][0]['metric'].replace('_', ' ')}: {result['verdict']}")


def mapping(given: list[str] | None) -> dict[str, str]:
    found = {}
    for entry in given or ():
        ours, equals, theirs = entry.partition("=")
        if not (ours and equals and theirs):
            raise FormaryError(f"--column {entry}: expected ours=yours, e.g. --column text=body")
        found[ours] = theirs
    return found


def _line(task: Any, row: Any, answer: dict[str, Any]) -> str:
    """An answer for the eye: what it is, how sure the model is, and the beginning of what it was asked."""
    from formary.pipeline.telling import asked, told

    if "similarity" in answer:
        said = f"{answer['similarity']:.3f}"
    else:
        said = "" if any(name.endswith("vector") for name in answer) else told(row, answer)
    if not said and not answer.keys() & {"labels", "answer", "choice", "text", "tags"}:
        return json_format.dumps(answer, ensure_ascii=False)
    sure = f"{answer['probability']:.3f}" if "probability" in answer else ""
    about = "" if "tags" in answer else asked(task, row, longest=80)
    return "\t".join(part for part in (said, sure, about) if part)
