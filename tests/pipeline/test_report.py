"""The page loads nothing, runs one script of its own, says what was measured and no more; the card is what Hugging Face reads."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard

from formary.evaluate.interval import Interval
from formary.pipeline import figures
from formary.pipeline.card import render_model_card, write_model_card
from formary.pipeline.findings import Energy, Metric, ReportData, Sample
from formary.pipeline.report import (
    headline,
    language_of,
    render_report,
    write_report,
)

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</style></pre></textarea>{{ 7 * 7 }}"


class Page(HTMLParser):
    """Elements in order, their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u2060", "").split())


def story(text: str = "THE END") -> dict:
    """As data.documents.write_documents returns it."""
    return {
        "files": [{"file": text, "for": "sources", "rows": 4000}],
        "bytes_read": 1_000_000,
        "rows_read": 4000,
        "steps": [
            {"step": "repair", "changed": 31, "dropped": 0, "examples": [text]},
            {"step": "control_characters", "changed": 0, "dropped": 0, "examples": []},
            {"step": "duplicates", "changed": 0, "dropped": 100, "examples": [text]},
        ],
        "splits": {
            "train": {"rows": 3494, "chars": 880_000, "bytes": 890_000, "tokens": 250_000},
            "validation": {"rows": 200, "chars": 50_000, "bytes": 51_000, "tokens": 15_000},
            "test": {"rows": 200, "chars": 50_000, "bytes": 52_000, "tokens": 15_000},
        },
        "duplicates_across_splits": {
            "exact": 6,
            "near": None,
            "validation_in_test": 0,
            "removed": 6,
            "examples": [text],
        },
        "augmented": 0,
        "warnings": [text],
    }


def report(text: str = "plain words") -> ReportData:
    """A report in which every free string is `text`."""
    return ReportData(
        name=text,
        description=text,
        task="causal_lm",
        created="2031-02-03T04:05:06",
        formary_version="1.0",
        recipe=f"name: demo\nnote: {text}\n",
        story=story(text),
        tokenizer={"kind": "bpe", "vocab_size": 2048, "path": text},
        model={"parameters": 3_712_256, "layers": 4, "width": 256, "context": 128, "family": text, "best_step": None},
        training=[
            {
                "step": s,
                "loss": 1.5 + 60 / s,
                "lr": 1e-3 * s / 1000,
                "tokens_per_second": 9000.0 + s % 7,
                "grad_norm": 1.0,
            }
            for s in range(10, 1001, 10)
        ],
        validation=[
            {"step": s, "validation_loss": 1.7 + 60 / s, "validation_bits_per_byte": 1.0 + 30 / s}
            for s in range(100, 1001, 100)
        ],
        metrics=[
            Metric(
                "bits_per_byte",
                text,
                Interval(2.05, 2.01, 2.09),
                {"5-gram": Interval(2.31, 2.27, 2.35), text: Interval(3.1, 3.0, 3.2)},
                {"5-gram": "better", text: "better"},
            ),
            Metric("perplexity", text, Interval(24.1, 23.2, 25.2)),
        ],
        samples=[Sample(text, text + text, {"note": text}), Sample("", text, step=500)],
        machine={"cpu": text, "cores": 2},
        times={"prepare": 3.0, "train": 200.0},
        energy=Energy(0.002, text),
        hashes={"data": "ab12", "recipe": text},
        next_commands=[text],
    )


def test_markup_in_any_string_is_shown_and_stays_inert():
    hostile, harmless = Page(render_report(report(ATTACK))), Page(render_report(report()))
    assert hostile.tags == harmless.tags, "no string adds or closes an element"
    assert [set(a) for _, a in hostile.elements] == [set(a) for _, a in harmless.elements], "nor an attribute"
    assert hostile.tags.count("script") == 1 and "img" not in hostile.tags
    assert hostile.text.count("{{ 7 * 7 }}") > 10, "it is there to be read"
    assert hostile.text.count("alert(1)") == hostile.text.count("{{ 7 * 7 }}")


def test_the_page_refers_to_nothing_outside_itself():
    page = Page(render_report(report()))
    for tag, attributes in page.elements:
        assert not {"src", "href", "action", "srcset", "data", "style"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "link" not in page.tags and "iframe" not in page.tags
    style = re.search("<style>(.*?)</style>", render_report(report()), re.S)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_the_script_loads_and_sends_nothing_and_a_page_without_curves_has_none():
    script = re.search("<script>(.*?)</script>", render_report(report()), re.S)[1]
    for word in ("fetch", "XMLHttpRequest", "import(", "eval", "innerHTML", "http://www.w3.org/1999", "localStorage"):
        assert word not in script
    assert "<script" not in render_report(replace(report(), training=[], validation=[]))


def test_curves_over_steps_carry_their_points():
    page = Page(render_report(report()))
    held = [json.loads(a["data-curves"]) for tag, a in page.elements if tag == "svg" and "data-curves" in a]
    assert len(held) >= 2
    for values in held:
        left, top, right, bottom = values["box"]
        assert left < right and top < bottom and values["over"] == "step"
        assert all(values["x"][0] <= x <= values["x"][1] for line in values["lines"] for x, _ in line["points"])
    validation = next(line for line in held[0]["lines"] if line["name"] == "validation")
    assert validation["points"] == [
        [r["step"], pytest.approx(r["validation_loss"], rel=1e-5)] for r in report().validation
    ]


def test_the_content_security_policy_allows_this_style_sheet_and_nothing_else():
    text = render_report(report())
    policy = next(a["content"] for _, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search("<style>(.*?)</style>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    script = re.search("<script>(.*?)</script>", text, re.S)[1]
    of_script = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{of_script}'"
    )


def test_headings_tell_the_findings():
    page = render_report(report())
    found = [Page(h).text for h in re.findall(r"<h[12]>.*?</h[12]>", page, re.S)]
    assert found == [
        "2.05 bits per byte [2.01, 2.09]; better than the 5-gram at 2.31",
        "Better than the 5-gram and the plain words",
        "Validation loss fell from 2.30 to 1.76 in 1,000 steps",
        "What it writes",
        "1 MB read, 4,000 documents, 2.6 % dropped",
        "A Transformer of 4 layers, 256 wide, 3.71 M parameters",
        "3 min 23 s of work on 2 cores, about 2 Wh",
        "Everything needed to repeat it",
    ]


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (
            Metric("bits_per_byte", "test", Interval(2.3, 2.2, 2.4), {"5-gram": Interval(2.31, 2.21, 2.42)}),
            "2.30 bits per byte [2.20, 2.40]; no clear difference from the 5-gram at 2.31",
        ),
        (
            Metric("bits_per_byte", "test", Interval(2.6, 2.5, 2.7), {"5-gram": Interval(2.31, 2.21, 2.42)}),
            "2.60 bits per byte [2.50, 2.70]; worse than the 5-gram at 2.31",
        ),
        (
            Metric("masked_accuracy", "test", Interval(0.41, 0.39, 0.43), {"unigram": Interval(0.05, 0.04, 0.06)}),
            "0.41 accuracy on masked tokens [0.39, 0.43]; better than the unigram at 0.05",
        ),
        (
            Metric("loss", "test", Interval(3.5, -math.inf, math.inf), {"5-gram": Interval(9, -math.inf, math.inf)}),
            "3.50 loss (nats per token); no clear difference from the 5-gram at 9.00",
        ),
        (
            Metric("perplexity", "test", Interval(575, 548.2, 603.9)),
            "575 perplexity [548, 604]; no baseline was measured",
        ),
    ],
)
def test_the_headline_says_no_more_than_the_intervals(metric, sentence):
    assert headline(ReportData(name="run", metrics=[metric])) == sentence


def test_the_paired_verdict_outweighs_overlapping_intervals_and_the_strongest_baseline_is_named():
    metric = Metric(
        "bits_per_byte",
        "test",
        Interval(2.3, 2.2, 2.4),
        {"unigram": Interval(3.9, 3.8, 4.0), "5-gram": Interval(2.32, 2.22, 2.42)},
        {"5-gram": "better", "unigram": "better"},
    )
    assert headline(ReportData(name="run", metrics=[metric])).endswith("better than the 5-gram at 2.32")


def test_a_rising_validation_loss_is_called_by_its_name():
    losses = [3.0, 2.5, 2.2, 2.3, 2.5]
    validation = [{"step": 100 * (i + 1), "validation_loss": loss} for i, loss in enumerate(losses)]
    page = Page(render_report(ReportData(name="run", validation=validation))).text
    assert "Validation loss fell from 3.00 to 2.20 in 300 steps, then rose to 2.50" in page
    assert "at the cost of unseen text" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": []},
        {"metrics": [Metric("loss", "test", Interval(math.nan, math.nan, math.nan))]},
        {"metrics": [Metric("loss", "test", Interval(3.0, -math.inf, math.inf), {"unigram": Interval(4.0, 4.0, 4.0)})]},
        {"validation": [{"step": 100, "validation_loss": 2.0}]},
        {"validation": []},
        {"training": [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 3.0}]},
        {"training": [], "validation": []},
        {"story": {}, "samples": [], "times": {}, "energy": None, "machine": {}, "hashes": {}, "next_commands": []},
        {"model": {}, "tokenizer": {}, "recipe": "", "description": ""},
        {"story": {"rows_read": 1, "splits": {"train": {"rows": 1, "chars": 90, "bytes": 90}}}},
        {"story": {"rows_read": 5, "steps": [], "splits": {"train": {"rows": 0, "chars": 0, "bytes": 0}}}},
        {"times": {"train": 0.0}},
    ],
)
def test_what_was_not_measured_is_left_out(changes):
    changed = replace(report(), **changes)
    page, card = Page(render_report(changed)), render_model_card(changed)
    assert page.tags.count("html") == 1
    for text in (page.text, card):
        assert not re.search(r"\b(nan|inf|None)\b", text)
    bare = Page(render_report(ReportData(name="run")))
    assert "run: nothing was measured" in bare.text.lower()
    assert "section" not in bare.tags


def test_a_single_text_flows_by_characters_and_one_with_nothing_dropped_says_so():
    given = story()
    given |= {"rows_read": 1, "steps": [], "duplicates_across_splits": {}, "warnings": []}
    page = Page(render_report(replace(report(), story=given)))
    assert "1 MB read, nothing dropped" in page.text
    assert "980,000 characters" in page.text


def test_duplicates_that_were_kept_are_confessed():
    given = story()
    given["duplicates_across_splits"]["removed"] = 0
    for text in (
        Page(render_report(replace(report(), story=given))).text,
        render_model_card(replace(report(), story=given)),
    ):
        assert "6 also occur in validation or test and were kept" in text


def test_content_carries_its_language():
    assert language_of("春風一夜入江城") == "zh"
    assert language_of("春風一夜入江城", "zh-Hant") == "zh-Hant"
    assert language_of("さくら、桜") == "ja"
    assert language_of("안녕하세요") == "ko"
    assert language_of("plain words", "en") == "en"
    assert language_of("plain words") == ""
    page = Page(render_report(replace(report(), samples=[Sample("春風", "一夜入江城")])))
    assert ("blockquote", {"lang": "zh"}) in page.elements


def test_every_figure_is_drawn_for_a_page_and_for_a_phone_and_described():
    page = Page(render_report(report()))
    figures_ = [a for tag, a in page.elements if tag == "svg"]
    assert {a["width"] for a in figures_} == {"720", "340"}
    assert all(a["role"] == "img" and a["aria-label"] for a in figures_)


def test_points_lie_where_their_numbers_are():
    svg = figures.curves([figures.Line("a", [(0, 1.0), (50, 3.0), (100, 2.0)])], x_label="step", y_label="value")
    points = [
        tuple(map(float, p.split(","))) for p in re.search('polyline class="line main" points="(.*?)"', svg)[1].split()
    ]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(2, abs=0.02)
    assert y1 < y2 < y0, "greater values lie higher"


def test_the_interval_bar_ends_at_its_bounds():
    svg = figures.intervals(
        [figures.Row("m", Interval(2, 1, 4), model=True), figures.Row("b", Interval(3, 3, 3))], unit="x"
    )
    x1, x2 = map(float, re.search('whisker model" x1="(.*?)" x2="(.*?)"', svg).groups())
    dot_m, dot_b = map(float, re.findall('circle class="block .*?" cx="(.*?)"', svg))
    assert (dot_m - x1) / (x2 - x1) == pytest.approx(1 / 3, abs=0.01)
    assert (dot_b - x1) / (x2 - x1) == pytest.approx(2 / 3, abs=0.01)


def test_numbers_of_a_table_are_not_broken_over_lines():
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    worst = [{"row": 1200, "text": "12 of these", "probability": -0.75, "label": None, "share": share}]
    text = render_report(replace(report(), details={"worst": worst}, leakage={"rows": 0}))
    assert re.findall(r'<td class="figure">([^<]+)</td>', text) == ["1,200", "-0.75", "–", "0.5 [0.25, 0.75]"]


def test_a_long_run_makes_a_small_page():
    training = [{"step": s, "loss": 3 + math.sin(s), "lr": 1e-3, "tokens_per_second": 9e3} for s in range(1, 50_001)]
    assert len(render_report(replace(report(), training=training))) < 250_000


def test_a_report_survives_json():
    original = replace(report(), metrics=[*report().metrics, Metric("loss", "x", Interval(1.0, -math.inf, math.inf))])
    again = ReportData.from_json(json.loads(json.dumps(original.to_json(), allow_nan=False)))
    assert render_report(again) == render_report(original)
    assert render_model_card(again) == render_model_card(original)


def test_files_are_written_whole(tmp_path):
    write_report(tmp_path / "report.html", report())
    write_model_card(tmp_path / "model" / "README.md", report())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(report())
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == render_model_card(report())


def test_hugging_face_reads_the_card():
    card = ModelCard(render_model_card(replace(report(), name="demo", license="apache-2.0", language="en")))
    assert card.data.license == "apache-2.0"
    assert card.data.language == "en"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["formary", "causal-lm"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"bits_per_byte": 2.05, "perplexity": 24.1}


def test_what_was_not_stated_is_not_invented_in_the_card():
    text = render_model_card(report())
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other"
    assert "language" not in front
    assert "No licence was stated" in text
    assert "The language of the data was not stated" in text


@pytest.mark.parametrize(
    ("task", "loader"),
    [
        ("causal_lm", "AutoModelForCausalLM"),
        ("masked_lm", "AutoModelForMaskedLM"),
        ("denoise", "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_card_shows_python_that_is_valid(task, loader):
    prompt = 'She said: "no\\yes"\nand ```left```'
    text = render_model_card(replace(report(), task=task, samples=[Sample(prompt, " the house")]))
    programs = re.findall("```python\n(.*?)\n```", text, re.S)
    assert len(programs) == 2
    for program in programs:
        compile(program, "card", "exec")
    assert f"{loader}.from_pretrained" in programs[1]


def test_markup_in_the_card_is_text():
    text = render_model_card(report("<b>x</b> | [a](b) ``` **c**"))
    outside = re.sub(r"(?ms)^(`{3,})[a-z]*\n.*?^\1$", "", text.split("---\n", 2)[2])
    assert "<b>" not in outside
    assert re.search(r"(?<!\\)\[a\]", outside) is None
    tables = [line for line in outside.splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert set(columns) <= {3, 6}, "a bar in a cell does not make a column"


def test_the_headline_metric_is_the_first_fact_and_a_metric_without_leaks_is_no_fact():
    low = Interval(0.5, 0.4, 0.6)
    named = [("tag_accuracy", "test"), ("tag_accuracy", "test without near-duplicates"), ("tag_macro_f1", "test")]
    metrics = [Metric(name, protocol, Interval(0.9 - n / 10, 0.8, 0.95)) for n, (name, protocol) in enumerate(named)]
    page = render_report(ReportData(name="t", task="tag", metrics=metrics, model={"parameters": 5}))
    facts = re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page)
    assert [name for name, _ in facts] == ["tag accuracy", "tag macro f1", "parameters"]
    assert facts[0][1].startswith("0.9") and headline(ReportData(name="t", metrics=metrics)).startswith("0.9")
    alone = render_report(ReportData(name="t", task="tag", metrics=[Metric("loss", "test", low)]))
    assert re.findall(r"<div><dt>(.*?)</dt>", alone) == ["loss (nats per token)"]


def test_a_baseline_whose_name_has_its_article_gets_no_second_one():
    metric = Metric("accuracy", "test", Interval(0.5, 0.4, 0.6), {"the longer text": Interval(0.5, 0.4, 0.6)})
    report = ReportData(name="t", metrics=[metric])
    assert headline(report).endswith("no clear difference from the longer text at 0.50")
    assert "No clear difference from the longer text" in render_report(report)
