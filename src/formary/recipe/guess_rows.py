"""From rows with answers to a commented recipe: which task the columns are for, and how to learn it.

Each rule looks at the columns' names and values and either knows its task or passes on; where none does, the rows are
text to pretrain on and `guess` decides. A guess is a start, to be edited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from formary.recipe.commented import Choice, Lines, duration, megabytes, percent, rounded
from formary.recipe.guess import Guess
from formary.recipe.guess_events import guess_events
from formary.recipe.guess_tables import guess_table
from formary.recipe.sample import Sample, Seen, cjk_share, describe, files_of, look, names_of, text_length
from formary.recipe.sizes import REACHED, parameter_estimate, token_counts, tokenizer_for

Rows = Sequence[Mapping[str, Any]]

_TOKENS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "pos_tags", "labels", "upos", "xpos")
_LABELS = (
    "label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "polarity", "recommended",
    "rating", "stars", "score", "y", "is_spam", "spam", "emotion", "language",
    "标签", "类别", "分类", "情感", "标注", "评分",
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "content", "body", "review", "message", "comment", "question", "document", "tweet",
    "文本", "内容", "评论", "正文", "句子",
)  # fmt: skip
_SECOND = ("text_pair", "subject", "title", "headline", "标题")
_PAIRS = (
    ("source", "target"), ("input", "output"), ("article", "summary"), ("article", "highlights"),
    ("document", "summary"), ("text", "summary"), ("dialogue", "summary"), ("body", "headline"), ("src", "tgt"),
    ("原文", "译文"), ("正文", "摘要"), ("正文", "标题"),
)  # fmt: skip
_INSTRUCTIONS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("question", "answer"),
)  # fmt: skip
_BESIDE = ("system", "input", "context")  # what an instruction may come with
_GROUPS = ("title", "article", "document_id", "doc_id")
_SENTENCES = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("question1", "question2"))
_CHOICES = ("choices", "options")
_ASKED = ("question", "input", "query", "prompt", "stem", "text")
_ANSWERS = ("answer", "scores", "label", "target_scores", "answer_idx", "answerkey", "correct", "gold")
_FEWEST_QUESTIONS = 2
_LANGUAGE = re.compile(r"^(en|zh|fr|de|es|it|ja|ko|ru|pt|nl|ar|cs|pl|sv|fi|tr|uk|vi|hi|da|el|ro|hu)([_-]\w+)?$")
_FEWEST_GROUPS = 20  # fewer cannot be split by shares
_EPOCHS = ((2_000, 10), (20_000, 4), (None, 2))
_LONGEST = 384  # tokens of a row
# Of a conversation, whose end is what is learned: cut off, the row teaches nothing. Its template takes tokens too.
_LONGEST_TALK, _TEMPLATE = 1024, 32
_PRESETS = {"translate": "seq2seq-mini", "chat": "gpt-mini"}


@dataclass(frozen=True)
class _Found:
    """A task, the columns it reads under our names, and why it was chosen."""

    task: str
    columns: dict[str, str]  # ours: theirs
    why: str
    group: Choice | None = None  # the column whose equal values stay together
    start: Choice | None = None  # what model.start has to be


def guess_rows(sample: Sample, *, name: str, task: str | None = None, gflops: float = 50.0) -> Guess | None:
    """Guess a recipe for rows with answers; None where the rows seem to be plain text.

    Args:
        task: only this task; any when left out.
    """
    rules = (
        _choices,
        _tagged,
        _questions,
        _messages,
        _preferences,
        _instructions,
        _anchors,
        _sentence_pairs,
        _text_pairs,
        _labelled,
    )
    if sample.kind == "text":
        return None
    judged = _first(sample.rows, _TEXTS) and _first(
        sample.rows, _LABELS
    )  # reviews: what is said counts, not who says it
    asked = task == "next_item" or (task is None and not judged)
    if asked and (events := guess_events(sample, name=name, gflops=gflops)):
        return events
    if numbers := guess_table(sample, name=name, task=task, gflops=gflops):
        return numbers
    found = next((one for rule in rules if (one := rule(sample.rows)) and task in (None, one.task)), None)
    if found and found.task == "preference":
        return _after_chat(sample, found, name, gflops)
    return _written(sample, found, name, gflops) if found else None


# One rule for each form of rows ---------------------------------------------------------------------------------------


def _choices(rows: Rows) -> _Found | None:
    choices = next((name for wanted in _CHOICES for name in names_of(rows) if name.lower() == wanted), None)
    having = [row for row in rows if choices and isinstance(row.get(choices), list | str) and row[choices]]
    question, answer = _first(having, _ASKED), _first(having, _ANSWERS)
    if not (choices and question and answer) or len(having) < _FEWEST_QUESTIONS:
        return None
    columns = {"question": question, "choices": choices, "answer": answer}
    why = f"each row has a question, {choices} and the right one in {answer}"
    left = len(rows) - len(having)
    if left:
        why = f"rows have a question, {choices} and {answer}; about {percent(left / len(rows))} lack them and are left out"
    return _Found("multiple_choice", columns, why)


def _tagged(rows: Rows) -> _Found | None:
    tokens, tags = _first(rows, _TOKENS), _first(rows, _TAGS)
    if not tokens or not tags or sum(_fits(row.get(tokens), row.get(tags)) for row in rows[:50]) < 0.5 * len(rows[:50]):
        return None  # a row or two of unequal length are refused by name when they are read
    return _Found("tag", {"tokens": tokens, "tags": tags}, "each row has words and as many tags")


def _questions(rows: Rows) -> _Found | None:
    question, context = _first(rows, ("question",)), _first(rows, ("context", "passage", "paragraph"))
    answers = _first(rows, ("answers", "answer"))
    if not (question and context and answers) or not isinstance(rows[0].get(answers), dict | list):
        return None
    columns = {"question": question, "context": context, "answers": answers}
    title = _first(rows, _GROUPS)
    group = (
        Choice(title, f"no {title} in two splits")
        if title and len({str(row.get(title)) for row in rows}) >= _FEWEST_GROUPS
        else Choice("context", "no context in two splits")
    )
    return _Found("answer_span", columns, "each row has a question, a context and answers in it", group)


def _messages(rows: Rows) -> _Found | None:
    column = _first(rows, ("messages", "conversations", "conversation"))
    value = rows[0].get(column) if column else None
    if not column or not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    return _Found("chat", {"messages": column}, "each row is a conversation")


def _preferences(rows: Rows) -> _Found | None:
    if not {"chosen", "rejected"} <= set(names_of(rows[:20])):
        return None
    prompt = _first(rows, ("prompt", "question", "instruction")) or "prompt"
    columns = {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}
    return _Found("preference", columns, "each row has a chosen and a rejected answer")


def _instructions(rows: Rows) -> _Found | None:
    names = {name.lower(): name for name in names_of(rows[:20])}
    for asked, answered in _INSTRUCTIONS:
        if asked in names and answered in names and all(_text(rows, names[name]) for name in (asked, answered)):
            columns = {name: names[name] for name in (asked, answered, *_BESIDE) if name in names}
            return _Found("chat", columns, f"each row is one turn of a talk: {names[asked]}, then {names[answered]}")
    return None


def _anchors(rows: Rows) -> _Found | None:
    anchor, positive = _first(rows, ("anchor", "query", "text")), _first(rows, ("positive",))
    return (
        _Found("embed", {"text": anchor, "positive": positive}, "texts with positives") if anchor and positive else None
    )


def _sentence_pairs(rows: Rows) -> _Found | None:
    label = _first(rows, _LABELS)
    for one, other in _SENTENCES:
        if label and {one, other} <= set(names_of(rows[:20])):
            columns = {"text": one, "text_pair": other, "label": label}
            return _Found("classify", columns, f"pairs of texts, and {label} says how they are related")
    return None


def _text_pairs(rows: Rows) -> _Found | None:
    names = names_of(rows[:20])
    by_lower = {name.lower(): name for name in names}
    for source, target in _PAIRS:
        if source in by_lower and target in by_lower and all(_text(rows, by_lower[n]) for n in (source, target)):
            columns = {"source": by_lower[source], "target": by_lower[target]}
            return _Found("translate", columns, f"{target} is written for {source}")
    languages = [name for name in names if _LANGUAGE.match(name.lower()) and _text(rows, name)]
    if len(languages) == 2:
        columns = {"source": languages[0], "target": languages[1]}
        return _Found("translate", columns, f"the same text in {languages[0]} and {languages[1]}")
    return None


def _labelled(rows: Rows) -> _Found | None:
    label = _first(rows, _LABELS)
    texts = [name for name in names_of(rows[:20]) if name != label and _text(rows, name)]
    usual = [name for wanted in _TEXTS for name in texts if name.lower() == wanted]
    text = usual[0] if usual else max(texts, key=lambda name: text_length(rows, name), default=None)
    if text is None:
        return None
    if label is None:
        few = [name for name in names_of(rows[:20]) if name != text and _few_values(rows, name)]
        if len(few) != 1:
            return None
        label = few[0]
    values = [row.get(label) for row in rows if row.get(label) not in (None, "")]
    if len({str(value) for value in values}) < 2:
        return None
    columns = {"text": text, "label": label}
    second = next((name for name in names_of(rows[:20]) if name.lower() in _SECOND and name not in (text, label)), None)
    if second:
        columns["text_pair"] = second
    return _Found("classify", columns, describe(rows, label) + " is what to tell from the text")


# Writing the recipe ---------------------------------------------------------------------------------------------------


def _after_chat(sample: Sample, found: _Found, name: str, gflops: float) -> Guess:
    """Preferences change a model that writes already: a first recipe trains one on the chosen answers."""
    prompt = found.columns["prompt"]
    group = Choice(prompt, "no prompt in two splits, and the same split in both recipes")
    why = f"the {prompt} and the chosen answer are a talk; `{name}` starts from the model that learns it"
    chat = _Found("chat", {"prompt": prompt, "response": "chosen"}, why, group)
    texts, seen = _look(sample, found)
    tokens = token_counts(seen, tokenizer_for(seen, "causal_lm"))[1]
    context = _context(texts, tokens / max(1, seen.count), talk=True)
    before = _written(sample, chat, f"{name}-chat", gflops, context)  # no shorter than what follows reads
    file = f"{name}-chat.yaml"
    start = Choice(f"recipe:{file}", "this recipe runs first; a model folder or another model that writes will do too")
    after = _written(sample, replace(found, group=group, start=start), name, gflops, context)
    parameters, seconds = before.parameters, before.seconds + after.seconds
    return replace(after, before=((file, before.recipe),), parameters=parameters, seconds=seconds)


def _written(sample: Sample, found: _Found, name: str, gflops: float, context: Choice | None = None) -> Guess:
    texts, seen = _look(sample, found)
    kind = {"translate": "denoise", "chat": "causal_lm", "preference": "causal_lm"}.get(found.task, "masked_lm")
    tokenizer = tokenizer_for(seen, kind)
    vocab_size, tokens = token_counts(seen, tokenizer)
    epochs = next(epochs for limit, epochs in _EPOCHS if limit is None or seen.count < limit)
    context = context or _context(texts, tokens / max(1, seen.count), talk=found.task == "chat")
    size = "4x192" if seen.count > 1000 else "3x128"
    parameters = parameter_estimate(kind, size, vocab_size, context.value)
    seconds = 6 * parameters * tokens * epochs / (gflops * 1e9 * REACHED)
    lines = Lines()
    lines.comment(f"{name}: written by `formary init` after a look at {percent(sample.share)} of the data.")
    lines.comment("Every value is a guess with its reason beside it. `formary run` executes it as it stands.")
    lines.add(0, "name", name, "names the run folder, runs/" + name)
    lines.add(0, "task", found.task, found.why)
    lines.section("data")
    lines.add(1, "sources", list(sample.sources), f"{files_of(sample)}, about {rounded(seen.count)} rows")
    for part in ("validation", "test"):
        if getattr(sample, part):
            lines.add(1, part, list(getattr(sample, part)), "lies beside it under a name that says so")
    columns = {ours: theirs for ours, theirs in found.columns.items() if ours != theirs}
    if columns:
        lines.add(1, "columns", columns, "our names: yours")
    if sample.encoding != "utf-8":
        lines.add(1, "encoding", sample.encoding, "the file is not UTF-8")
    lines.section("split", 1)
    for part, share in (("validation", 0.1), ("test", 0.15)):
        lines.add(
            2, part, 0.0 if getattr(sample, part) else share, "share of the rows; a row stays where it is as data grows"
        )
    if found.group:
        lines.add(2, "group", *found.group)
    if found.start:
        lines.section("model")
        lines.add(1, "start", *found.start)
    else:
        _write_model(lines, found, tokenizer, parameters, size, seen.count)
    lines.section("train")
    lines.add(1, "epochs", epochs, f"passes over the rows; roughly {duration(seconds)} here")
    lines.add(1, "batch", 32, "rows per step, of like length")
    lines.add(1, "context", *context)
    lines.section("optimiser", 1)
    if found.start:
        lines.add(2, "lr", 0.0001, "peak rate, gentle with what the model has learned")
    else:
        lines.add(2, "lr", 0.0005, "peak rate, for a model from scratch")
    lines.section("schedule", 1)
    lines.add(2, "warmup", 0.1, "share of the run")
    lines.add(2, "final", 0.0, "to nothing")
    steps = max(1, round(seen.count * 0.75 * epochs / 32))
    lines.add(1, "validate_every", max(10, steps // 10), "steps; the best weights are kept")
    saw = [f"{files_of(sample)}, about {megabytes(seen.bytes)} of text in about {rounded(seen.count)} rows"]
    saw.append("columns: " + ", ".join(describe(sample.rows, column) for column in names_of(sample.rows[:100])))
    saw.append(f"task {found.task}: {found.why}")
    if (share := cjk_share(" ".join(texts[:500]))) > 0.02:
        saw.append(f"{percent(share)} of the letters are Chinese or Japanese")
    return Guess(lines.text(), found.task, tuple(saw), parameters, seconds)


def _look(sample: Sample, found: _Found) -> tuple[list[str], Seen]:
    """The texts of the columns that the task reads, and what is counted in them."""
    texts = [" ".join(_strings([row.get(theirs) for theirs in found.columns.values()])) for row in sample.rows]
    return texts, look(texts, sample.share, files=sample.files, cut="row")


def _write_model(lines: Lines, found: _Found, tokenizer: Choice, parameters: float, size: str, rows: float) -> None:
    lines.section("tokenizer", 1)
    for place, (setting, value) in enumerate(tokenizer.value.items()):
        lines.add(2, setting, value, "" if place else tokenizer.why)
    lines.section("model")
    lines.comment("A pretrained model learns far more from few rows: give its folder as model.start and leave out", 1)
    lines.comment("data.tokenizer, model.preset and model.size, with train.optimiser.lr near 1e-4.", 1)
    lines.add(
        1,
        "preset",
        _PRESETS.get(found.task, "bert-mini"),
        f"about {parameters / 1e6:.1f} million parameters, from scratch",
    )
    lines.add(1, "size", size, f"layers x width, for about {rounded(rows)} rows")
    lines.add(1, "switches", {"dropout": 0.1}, "rows are few, so some forgetting helps")


def _context(texts: Sequence[str], mean_tokens: float, *, talk: bool = False) -> Choice:
    """Tokens of nearly all rows, up to 384, of conversations up to 1024, in steps of 32."""
    lengths = sorted(map(len, texts))
    share = mean_tokens / max(1.0, sum(lengths) / len(lengths))
    needed = int(lengths[int(0.95 * (len(lengths) - 1))] * share) + (_TEMPLATE if talk else 8)
    context = min(_LONGEST_TALK if talk else _LONGEST, max(32, -(-needed // 32) * 32))
    return Choice(
        context, "tokens per row, enough for 19 of 20" if context >= needed else "tokens per row; longer ones are cut"
    )


# Looking --------------------------------------------------------------------------------------------------------------


def _first(rows: Rows, names: Sequence[str]) -> str | None:
    """The first of the usual names that the rows have as a column, in the columns' own spelling."""
    by_lower = {name.lower(): name for name in names_of(rows[:20])}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _fits(tokens: Any, tags: Any) -> bool:
    return isinstance(tokens, list) and isinstance(tags, list) and len(tokens) == len(tags)


def _text(rows: Rows, name: str) -> bool:
    values = [row.get(name) for row in rows[:200]]
    return sum(isinstance(value, str) and not _number(value) for value in values) > 0.5 * len(values)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _few_values(rows: Rows, name: str) -> bool:
    values = [str(row.get(name)) for row in rows]
    return 2 <= len(set(values)) <= min(20, len(values) // 10)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _strings(inner)]
    return []
