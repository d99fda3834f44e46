"""The post-mortem of skipped steps: in the report with text, losses and layers, and absent where nothing went wrong."""

import html
import json
import re

import pytest

from formary.errors import FormaryError
from formary.pipeline.findings import ReportData
from formary.pipeline.incidents import post_mortem
from formary.pipeline.report import render_report
from formary.train import loop

SKIPPED = {
    "step": 7,
    "roll_backs": 0,
    "why": "loss nan and gradient norm nan are not finite",
    "shape": [4, 33],
    "layers": {"transformer.blocks.0": None, "head": 0.25},
    "worst": [{"sequence": 2, "loss": None, "text": "<b>the cat</b>"}],
}
BACK = {"step": 3, "roll_backs": 1, "why": "rolled back", "lr_factor": 0.5}


def test_what_went_wrong_is_in_the_report_and_escaped():
    page = render_report(ReportData(name="x", incidents=[SKIPPED, BACK]))
    text = html.unescape(re.sub("<[^>]+>", " ", page)).replace("\u00a0", " ")
    assert "1 step was skipped, and training went back once" in text
    assert "After step 7 it went back to step 3, and went on with 0.5 of the learning rate" in text
    assert "<b>the cat</b>" not in page and "<b>the cat</b>" in html.unescape(page)
    assert re.search(r"transformer\.blocks\.0\s+not finite\s+head\s+0\.25", text)


def test_a_calm_training_says_nothing():
    assert post_mortem([]) is None and 'id="incidents"' not in render_report(ReportData(name="x"))


def test_many_incidents_are_counted_not_listed():
    found = post_mortem([SKIPPED | {"step": step} for step in range(25)])
    assert len(found["shown"]) == 10 and found["more"] == 15 and "25 steps were skipped" in found["heading"]


def test_a_run_with_a_bad_batch_reports_its_text(place, monkeypatch):
    gradient, calls = loop.gradient, iter(range(1000))

    def spoilt(*arguments):
        loss, count, norm = gradient(*arguments)
        return (float("nan") if next(calls) == 2 else loss), count, norm

    monkeypatch.setattr(loop, "gradient", spoilt)
    place.run()
    told = [json.loads(line) for line in (place.run_folder / "incidents.jsonl").read_text().splitlines()]
    assert [one["step"] for one in told] == [2]
    words = (place.folder / "text.txt").read_text()
    assert told[0]["worst"][0]["text"].strip(".\n ").split()[1] in words
    page = (place.run_folder / "report.html").read_text()
    assert 'id="incidents"' in page and html.escape(told[0]["worst"][0]["text"][:10]) in page


def test_a_run_that_diverges_for_good_keeps_its_post_mortem(place, monkeypatch):
    gradient = loop.gradient
    monkeypatch.setattr(loop, "gradient", lambda *arguments: (float("inf"), *gradient(*arguments)[1:]))
    with pytest.raises(FormaryError, match="training diverged"):
        place.run("train.steps=100", "train.stability={roll_back_after: 2, roll_backs: 1}")
    assert len((place.run_folder / "incidents.jsonl").read_text().splitlines()) == 5
