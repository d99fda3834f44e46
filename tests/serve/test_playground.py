"""The playground's routes and files: what they tell, what they refuse, and that nothing in them can be made to run."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.infer import kernels
from formary.infer.loaded import Model
from formary.infer.sampling import History, SamplingSettings, Table, process
from formary.serve.examples import EXAMPLES
from formary.serve.playground import StagesRequest, curves, described, folder_of, listed, stages, tabs

STATIC = files("formary.serve") / "static"
FILES = {entry.name: entry.read_text(encoding="utf-8") for entry in STATIC.iterdir() if entry.is_file()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}

optional = st.one_of
CHOSEN = st.fixed_dictionaries(
    {},
    optional={
        "temperature": optional(st.just(0.0), st.floats(0.05, 3)),
        "top_k": st.integers(1, 60),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.9),
        "typical_p": st.floats(0.05, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
    },
)


@pytest.fixture
def writer(models: dict[str, Callable[..., Model]]) -> Model:
    return models["writer"]()


# --- sampling, stage by stage ---


@settings(max_examples=60, deadline=None)
@given(chosen=CHOSEN, seed=st.integers(0, 9), answer=st.lists(st.integers(0, 299), max_size=6))
def test_the_last_stage_is_what_the_engine_draws_from(
    session_writer: Model, chosen: dict[str, Any], seed: int, answer: list[int]
) -> None:
    vocabulary = session_writer.config.vocab_size
    answer = [token % vocabulary for token in answer]
    logits = 3 * torch.randn((1, vocabulary), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    asked = StagesRequest(model="writer", prompt=[1, 2], answer=answer, top=50, **chosen)
    told = stages(session_writer, logits, asked)

    used = session_writer.request((1, 2), 1, chosen)[0].settings
    history = History(vocabulary, (1, 2))
    for token in answer:
        history.add(token)
    final = process(logits, Table([used]), [history])[0]
    expected = final.softmax(dim=-1)
    if used.greedy:
        expected = torch.zeros(vocabulary, dtype=torch.float64)
        expected[final.argmax()] = 1
    first = logits[0].softmax(dim=-1)
    for one in told["tokens"]:
        assert one["probabilities"][-1] == expected[one["id"]]
        assert one["probabilities"][0] == first[one["id"]]
    assert told["stages"][-1]["kept"] == int((expected > 0).sum())
    assert {one["id"] for one in told["tokens"]} >= set(first.topk(5).indices.tolist())


@pytest.fixture(scope="session")
def session_writer() -> Model:
    return _small_writer()


def _small_writer() -> Model:
    from formary.data import tokenizer as tokenizers
    from formary.model.topologies import build
    from formary.recipe import schema
    from formary.recipe.presets import preset

    words = tokenizers.train(
        ["The cat sat on the mat."], schema.Tokenizer(kind="bytes", vocab_size=280), task="causal_lm"
    )
    config = preset("gpt-mini", vocab_size=words.vocab_size, context=64, size="1x16")
    return Model(build(config, seed=0).double().eval(), words)


def test_each_stage_turns_on_one_setting_and_keeps_those_before(session_writer: Model) -> None:
    logits = torch.linspace(-3, 3, session_writer.config.vocab_size, dtype=torch.float64)[None]
    asked = StagesRequest(model="w", prompt=[1], temperature=0.5, top_k=7, min_p=0.4, top=50)
    told = stages(session_writer, logits, asked)
    by_name = {stage["name"]: place for place, stage in enumerate(told["stages"])}
    for name, used in {
        "model": SamplingSettings(temperature=1.0),
        "temperature": SamplingSettings(temperature=0.5),
        "top_k": SamplingSettings(temperature=0.5, top_k=7),
        "min_p": SamplingSettings(temperature=0.5, top_k=7, min_p=0.4),
    }.items():
        expected = process(logits, Table([used]), [None])[0].softmax(dim=-1)
        for one in told["tokens"]:
            assert one["probabilities"][by_name[name]] == expected[one["id"]]
    assert [stage["name"] for stage in told["stages"] if stage["active"]] == ["model", "temperature", "top_k", "min_p"]
    assert told["stages"][by_name["top_k"]]["kept"] == 7


def test_stages_wait_for_their_turn_at_the_cores_also_where_the_logits_are_known(
    served: Any, until: Callable[..., None]
) -> None:
    body = {"model": "writer", "prompt": [1, 2], "temperature": 0.7}
    known = served.post("/playground/stages", body).json()
    answers: list[Any] = []
    ask = threading.Thread(target=lambda: answers.append(served.post("/playground/stages", body).json()))
    with served.service.turns.turn():
        ask.start()
        until(lambda: served.service.turns._line)
        assert not answers
    ask.join()
    assert answers == [known]


def test_parameters_are_counted_also_where_they_are_rounded(session_writer: Model) -> None:
    plain = Model(copy.deepcopy(session_writer.network).float(), session_writer.tokenizer)
    if "int8" not in kernels.available():
        pytest.skip("this processor has no int8 kernel")
    rounded, _ = plain.in_precision("int8")
    count = sum(parameter.numel() for parameter in plain.network.parameters())
    assert sum(parameter.numel() for parameter in rounded.network.parameters()) < count
    assert described("writer", rounded)["parameters"] == described("writer", plain)["parameters"] == count


def test_stages_start_from_the_probabilities_that_the_api_reports(served: Any) -> None:
    prompt = served.post("/tokenize", {"model": "writer", "prompt": "The cat"}).json()["tokens"]
    body = {"model": "writer", "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 3}
    written = served.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    for place, token in enumerate(written["token_ids"]):
        asked = {"model": "writer", "prompt": prompt, "answer": written["token_ids"][:place], "temperature": 0}
        told = served.post("/playground/stages", asked).json()
        mine = next(one for one in told["tokens"] if one["id"] == token)
        expected = torch.tensor(written["token_logprobs"][place], dtype=torch.float64).exp()
        assert mine["probabilities"][0] == pytest.approx(float(expected), rel=1e-6)
        assert mine["probabilities"][-1] == 1  # greedy: the engine took it
        assert [one["id"] for one in told["tokens"]][:3] == written["top_token_ids"][place]


def test_the_chosen_token_is_listed_however_unlikely(served: Any) -> None:
    for token in range(0, 280, 40):
        told = served.post("/playground/stages", {"model": "writer", "prompt": [1], "token": token, "top": 3}).json()
        assert token in [one["id"] for one in told["tokens"]]
        assert len(told["tokens"]) == 3


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "nobody", "prompt": [1]}, 404, "nobody"),
        ({"model": "writer", "prompt": []}, 400, "no tokens"),
        ({"model": "writer", "prompt": [10**6]}, 400, "vocabulary"),
        ({"model": "writer", "prompt": [1] * 600}, 400, "context"),
        ({"model": "writer", "prompt": [1], "top_k": 0}, 400, "top_k"),
        ({"model": "writer", "prompt": [1], "tok_k": 3}, 400, "tok_k"),
        ({"model": "classify", "prompt": [1]}, 400, "does not write"),
        ({"model": "writer", "prompt": "text"}, 400, "prompt"),
        ({"model": "writer", "prompt": [1], "temperature": True}, 400, "temperature"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_with_a_sentence(
    served: Any, body: dict[str, Any], status: int, says: str
) -> None:
    answer = served.post("/playground/stages", body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


# --- models ---


def test_every_model_says_which_tabs_it_has(served: Any) -> None:
    told = {one["id"]: one for one in served.client.get("/playground/models").json()["models"]}
    assert {name: one["tabs"] for name, one in told.items()} == {
        "writer": ["chat", "complete"],
        "plain": ["complete"],
        "classify": ["classify"],
        "tag": ["tag"],
        "embed": ["embed"],
        "translate": ["translate"],
        "answer_span": ["span"],
    }
    assert told["classify"]["labels"] == ["no", "yes"]
    assert told["writer"]["context"] == 512
    assert told["writer"]["ends"]
    for one in told.values():
        assert set(one["examples"]) <= set(one["tabs"])
        assert all(one["examples"].get(tab) for tab in one["tabs"])


def test_an_encoder_decoder_without_a_task_is_not_said_to_translate(models: dict[str, Callable[..., Model]]) -> None:
    translator = models["answerer"]("translate")
    assert tabs(translator) == ["translate"]
    assert tabs(Model(translator.network, translator.tokenizer)) == ["rewrite"]


def test_models_of_pictures_and_items_have_tabs_of_their_own(models: dict[str, Callable[..., Model]]) -> None:
    assert tabs(models["seer"]("classify_image")) == ["picture"] == tabs(models["seer"]("caption"))
    assert tabs(models["seer"]("detect")) == ["picture"]
    assert tabs(models["seer"]("match_image_text")) == ["match"]
    assert tabs(models["seer"]("generate_image")) == ["paint"]
    assert described("painter", models["seer"]("generate_image"))["labels"] == ["a", "b"]
    assert tabs(models["recommender"]()) == ["recommend"]


def test_every_unit_of_speed_has_its_word() -> None:
    from formary.recipe.schema import UNITS

    assert all(f"  unit_{unit}: [" in FILES["strings.js"] for unit in {"tokens", *UNITS.values()})


def test_items_are_found_by_name_and_text(start: Any, models: Any, tmp_path: Path) -> None:
    rows = [{"item": f"film-{n}", "text": f"The {n}th <b>Night</b>" if n % 2 else f"Ein Morgen {n}"} for n in range(30)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {"films": models["recommender"](tmp_path), "bare": models["recommender"](), "writer": models["writer"]()}
    with start(made) as server:

        def asked(**query: Any) -> Any:
            return server.client.get("/playground/items", params=query)

        found = asked(model="films", find="NIGHT 7th").json()["items"]
        texts = {one["item"]: one["text"] for one in found}
        assert texts.keys() == {"film-7", "film-17", "film-27"} and texts["film-7"] == "The 7th <b>Night</b>"
        assert asked(model="films", find="film-1").json()["items"][0]["item"] == "film-1"
        assert len(asked(model="films").json()["items"]) == 20
        told = asked(model="films", item=["film-2", "gone", "film-3"]).json()["items"]
        assert [one["text"] for one in told] == ["Ein Morgen 2", "The 3th <b>Night</b>"]
        assert asked(model="bare", find="film-2").json()["items"][0] == {"item": "film-2", "text": ""}
        for wrong in ("writer", "gone"):
            assert asked(model=wrong).status_code == 404
        assert server.client.get("/playground/items").status_code == 400


def test_the_page_needs_no_key_and_what_it_tells_does(start: Any, writer: Model, tmp_path: Path) -> None:
    with start({"writer": writer}, api_keys=("secret",), runs=tmp_path) as server:
        for path in ("/", "/static/app.js", "/static/page.css"):
            assert server.client.get(path).status_code == 200
        for path in ("/playground/models", "/playground/runs", "/playground/runs/x", "/playground/items?model=writer"):
            assert server.client.get(path).status_code == 401
        assert server.post("/playground/stages", {"model": "writer", "prompt": [1]}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert server.client.get("/playground/models", headers=key).status_code == 200


# --- runs ---


def _run(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_only_run_folders_directly_inside_are_found(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    _run(runs / "good", {"step": 1, "loss": 2.0})
    _run(runs / "名字 2", {"step": 1, "loss": 2.0})
    _run(runs / ".hidden", {"step": 1, "loss": 2.0})
    _run(tmp_path / "outside", {"step": 1, "loss": 9.0})
    (runs / "empty").mkdir()
    (runs / "link").symlink_to(tmp_path / "outside")
    (runs / "inner").mkdir()
    (runs / "inner" / "metrics.jsonl").symlink_to(tmp_path / "outside" / "metrics.jsonl")
    assert {run["name"] for run in listed(runs)} == {"good", "名字 2"}
    assert folder_of(runs, "good") == runs / "good"
    for name in (
        "",
        ".",
        "..",
        "../outside",
        "good/../../outside",
        "/etc",
        "a\x00b",
        "link",
        "inner",
        "good/",
        "x" * 300,
    ):
        assert folder_of(runs, name) is None, name


@pytest.mark.parametrize(
    "path",
    ["..", "%2e%2e", "..%2foutside", "%2e%2e%2foutside", "good%2f..%2f..%2foutside", "link", "good%00", "..%5coutside"],
)
def test_a_name_that_leads_outside_is_refused(start: Any, writer: Model, tmp_path: Path, path: str) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    _run(runs / "good", {"step": 1, "loss": 2.0})
    _run(tmp_path / "outside", {"step": 1, "loss": 987.5})
    (runs / "link").symlink_to(tmp_path / "outside")
    with start({"writer": writer}, runs=runs) as server:
        assert server.client.get("/playground/runs/good").json()["training"]["loss"] == [2.0]
        answer = server.client.get(f"/playground/runs/{path}")
        assert answer.status_code == 404
        assert "987.5" not in answer.text


def test_a_run_that_goes_on_is_told_anew_and_one_that_rests_is_not(start: Any, writer: Model, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", {"step": 1, "loss": 3.0, "lr": 0.1, "tokens_per_second": 10.0, "tokens": 8})
    with start({"writer": writer}, runs=tmp_path) as server:
        first = server.client.get("/playground/runs/run")
        again = {"If-None-Match": first.headers["etag"]}
        assert server.client.get("/playground/runs/run", headers=again).status_code == 304
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "loss": 2.5, "lr": 0.1}\n{"step": 2, "validation_loss": 2.6}\n{"step": 3, "lo')
        told = server.client.get("/playground/runs/run", headers=again).json()
        assert told["training"] == {
            "step": [1, 2],
            "loss": [3.0, 2.5],
            "lr": [0.1, 0.1],
            "tokens_per_second": [10.0, None],
        }
        assert told["validation"] == {"step": [2], "validation_loss": [2.6]}
        assert told["unit"] == "tokens"
        (run / "recipe.yaml").write_text("name: run\ntask: classify_image\n")
        assert server.client.get("/playground/runs/run").json()["unit"] == "images"


def test_without_a_runs_folder_none_are_shown(served: Any) -> None:
    assert served.client.get("/playground/runs").json() == {"shown": False, "runs": []}
    assert served.client.get("/playground/runs/x").status_code == 404


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20_000))
def test_long_runs_are_thinned_evenly_and_keep_their_end(length: int) -> None:
    told = curves([{"step": step, "loss": 1.0} for step in range(1, length + 1)])["training"]["step"]
    assert told[-1] == length
    assert len(told) <= 1500
    gaps = {later - earlier for earlier, later in pairwise(told)}
    assert len(gaps) <= 1


# --- files ---


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2fplayground.py", "%2e%2e/playground.py", "index.html%00", "..%2f..%2f__init__.py"]
)
def test_no_file_beside_the_pages_own_is_given(served: Any, name: str) -> None:
    assert served.client.get(f"/static/{name}").status_code == 404


def test_the_policy_allows_nothing_but_the_servers_own_files(served: Any) -> None:
    policy = served.client.get("/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in policy


def test_the_page_has_no_inline_script_style_or_handler() -> None:
    html = FILES["index.html"]
    assert re.findall(r"<script(?![^>]*\ssrc=)[^>]*>", html) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", html) == []


def test_no_script_makes_markup_from_text_or_evaluates() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
    for name, text in SCRIPTS.items():
        assert re.findall(forbidden, text) == [], name


def test_the_page_works_offline() -> None:
    for name, text in FILES.items():
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text.replace("http://www.w3.org/2000/svg", ""))
        assert addresses == [], name


def test_every_module_and_stylesheet_that_is_asked_for_exists() -> None:
    asked = re.findall(r"/static/([\w.-]+)", FILES["index.html"])
    asked += [name for text in SCRIPTS.values() for name in re.findall(r"(?:from|import\() ?\"\./([\w.-]+)\"", text)]
    assert len(asked) > 10
    assert set(asked) <= set(FILES)


def test_every_sentence_exists_in_both_languages_with_the_same_blanks() -> None:
    sentences = _sentences()
    assert len(sentences) > 100
    for name, (english, chinese) in sentences.items():
        assert english.strip() and chinese.strip(), name
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", chinese)), name
        if not re.search(r"[\u4e00-\u9fff]", chinese):  # names that are the same in both
            assert english == chinese, name


def test_every_sentence_that_the_page_asks_for_exists() -> None:
    sentences = _sentences()
    asked = set(re.findall(r"data-(?:text|label)=\"(\w+)\"", FILES["index.html"]))
    for text in SCRIPTS.values():
        asked |= set(re.findall(r"\bt\(\"(\w+)\"", text))
        asked |= set(re.findall(r"\b(?:say|label|hint|ghost): \"(\w+)\"", text))
        asked |= set(re.findall(r"\b(?:runButton|labelled|keys)\(\"(\w+)\"", text))
        asked |= set(re.findall(r"\bpromptField\(\"\w+\", \"(\w+)\"", text))
    told = stages_named()
    asked |= {f"stage_{name}{end}" for name in told for end in ("", "_says")} | {"stage_kept", "stage_bits"}
    tabs_known = set(re.findall(r"\b(\w+): \w+Panel\b", FILES["app.js"]))
    assert tabs_known == {*EXAMPLES, "runs"}
    asked |= {f"tab_{tab}" for tab in tabs_known}
    fields = re.findall(r'^  \["(\w+)", ', FILES["settings.js"], flags=re.MULTILINE)
    assert {"temperature", "seed"} < set(fields)
    asked |= {f"{field}{end}" for field in fields for end in ("", "_says")}
    asked |= {
        f"{tab}_{end}"
        for tab in ("classify", "tag", "span", "embed", "choose", "fill")
        for end in ("ask", "says", "incomplete")
    }
    asked |= {f"finish_{reason}" for reason in ("stop", "length", "stopped")}
    names = {"title", "ghost", "label", "placeholder", "text"}  # where elements.js says how sentences are kept
    assert asked - set(sentences) - names == set()


def stages_named() -> list[str]:
    from formary.serve.playground import _STAGES

    return ["model", *_STAGES, "greedy"]


def _sentences() -> dict[str, tuple[str, str]]:
    text = FILES["strings.js"]
    string = r"\"((?:[^\"\\]|\\.)*)\""
    found = re.findall(rf"^  (\w+): \[\s*{string},\s*{string},?\s*\],$", text, flags=re.MULTILINE)
    assert len(found) == len(re.findall(r"^  \w+: \[", text, flags=re.MULTILINE))
    return {name: (english, chinese) for name, english, chinese in found}
