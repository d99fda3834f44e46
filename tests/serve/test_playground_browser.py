"""The playground as people use it: in headless Chromium, against a server with small random models."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MARKUP = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><b>bold</b>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        context = driver.chromium.launch_persistent_context(
            folder, executable_path=CHROMIUM, headless=True, args=FLAGS, locale="en-US"
        )
        context.set_default_timeout(30_000)
        yield context
        context.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever the browser complains about, or asks of others, fails the test."""
    pages: list[Any] = []
    complaints: list[str] = []

    def visit(url: str, *, width: int = 1280, height: int = 860, allowed: str = "\0", ready: str = "[role=tab]") -> Any:
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" and allowed not in m.text else None)
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(url) else None)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield visit
    for page in pages:
        page.close()
    assert complaints == []


def _write(page: Any, prompt: str, *, tokens: int = 12) -> None:
    page.fill("#setting-max_tokens", str(tokens))
    page.fill("#setting-seed", "3")
    page.fill("#field-prompt", prompt)
    page.keyboard.press("Control+Enter")
    _written(page, tokens)


def _written(page: Any, tokens: int) -> None:
    page.wait_for_function(
        "() => document.querySelector('.answer:not(.writing) .status')?.textContent.match(/finished|limit/)"
    )
    assert 1 <= page.locator(".token[data-place]").count() <= tokens


def _choose(page: Any, model: str, tab: str) -> None:
    page.select_option("#model", model)
    page.click(f"#tab-{tab}")


def test_markup_in_prompts_is_shown_and_never_run(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    _choose(page, "writer", "complete")
    _write(page, MARKUP)
    assert page.locator(".given").text_content() == MARKUP
    _choose(page, "writer", "chat")
    page.fill("#setting-max_tokens >> visible=true", "5")
    page.fill("#field-message", MARKUP)
    page.keyboard.press("Enter")
    page.wait_for_selector(".log .answer:not(.writing) .token")
    assert page.locator(".question").text_content() == MARKUP
    for model, tab, field in (("tag", "tag", "#field-text"), ("classify", "classify", "#field-text")):
        _choose(page, model, tab)
        page.fill(field, MARKUP)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".output:not(.writing) :is(.tagged, .ranking)")
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script, main b").count() == 0


def test_choosing_another_token_goes_on_from_exactly_there(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    _choose(page, "writer", "complete")
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(json.loads(r.post_data)) if r.url.endswith("/v1/completions") else None)
    _write(page, "The cat")
    first = served.post("/tokenize", {"model": "writer", "prompt": "The cat"}).json()["tokens"]
    assert asked[0]["prompt"] == first

    page.locator(".token").nth(4).click()
    page.wait_for_selector("#alternatives .alternative")
    assert page.locator("#alternatives .alternative").count() == 5
    page.locator("#alternatives .alternative:not(.own)").first.click()
    page.wait_for_selector(".token.picked")
    _written(page, 17)
    kept = served.post(
        "/playground/stages", {"model": "writer", "prompt": asked[1]["prompt"][:-1], "top": 5, "temperature": 1}
    ).json()
    assert asked[1]["prompt"][: len(first)] == first
    assert len(asked[1]["prompt"]) == len(first) + 5  # four that were kept, and the chosen one
    assert asked[1]["prompt"][-1] in [one["id"] for one in kept["tokens"]]
    assert page.locator(".pages").inner_text().split() == ["‹", "version", "2", "of", "2", "›"]
    page.click(".pages button:first-child")
    assert "version 1 of 2" in page.locator(".pages").inner_text()


def test_chat_goes_on_from_a_token_of_an_answer(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(json.loads(r.post_data)) if r.url.endswith("/v1/completions") else None)
    page.fill("#setting-max_tokens", "8")
    page.fill("#setting-seed", "3")
    page.fill("#field-message", "Hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".log .answer:not(.writing) .token:nth-child(3)")
    page.locator(".log .token").nth(2).click()
    page.locator("#alternatives .alternative:not(.own)").first.click()
    page.wait_for_selector(".token.picked")
    messages = [{"role": "user", "content": "Hello"}]
    prompt = served.post("/tokenize", {"model": "writer", "messages": messages}).json()["tokens"]
    assert asked[0]["prompt"][: len(prompt)] == prompt
    assert len(asked[0]["prompt"]) == len(prompt) + 3


def test_the_stages_of_a_token_follow_the_sliders(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    _choose(page, "writer", "complete")
    _write(page, "The cat")
    page.locator(".token").nth(2).click()
    page.click("#alternatives .wide")
    page.wait_for_selector("#stages table")
    assert page.locator("#stages thead th").all_inner_texts() == ["Token", "Model", "Temperature"]
    page.locator("#stage-top_k").focus()
    page.keyboard.press("Home")  # the smallest: 1
    page.wait_for_function("() => document.querySelectorAll('#stages tbody tr.gone').length === 19")
    assert page.locator("#stages thead th").all_inner_texts() == ["Token", "Model", "Temperature", "Top-k"]
    page.keyboard.press("Escape")
    assert page.locator("#stages").is_hidden()
    assert page.evaluate("document.activeElement.className").startswith("token")


def test_everything_about_a_token_can_be_done_by_keyboard(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-complete"
    page.fill("#setting-max_tokens", "6")
    page.fill("#setting-seed", "3")
    page.focus("#field-prompt")
    page.keyboard.type("The")
    page.keyboard.press("Control+Enter")
    _written(page, 6)
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.place") == "1"
    page.keyboard.press("Enter")
    page.wait_for_selector("#alternatives:popover-open")
    assert page.evaluate("document.getElementById('alternatives').contains(document.activeElement)")
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.activeElement.dataset.place === '1'")


def test_tasks_show_their_answers(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    for model, tab, shown in (
        ("classify", "classify", ".ranking li"),
        ("tag", "tag", ".tagged span"),
        ("answer_span", "span", ".big"),
        ("embed", "embed", ".matrix tbody td"),
        ("translate", "translate", ".written"),
    ):
        _choose(page, model, tab)
        page.locator("#panel .chip").first.click()
        if tab == "translate":
            page.keyboard.press("Control+Enter")
        page.wait_for_selector(f".output:not(.writing) {shown}", state="attached")
    _choose(page, "embed", "embed")
    assert page.locator(".matrix tbody td").first.inner_text() == "1.00"  # a text and itself


def test_a_refusal_is_shown_as_a_sentence(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url, allowed="400 (Bad Request)")
    _choose(page, "writer", "complete")
    page.fill("#field-prompt", "cat " * 600)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".answer .notice:not([hidden])")
    assert "context" in page.locator(".answer .notice").inner_text()


def test_language_and_theme_are_remembered(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    assert page.locator("html").get_attribute("lang") == "en"
    page.click("#language")
    page.click("#theme")
    theme = page.locator("html").get_attribute("data-theme")
    assert page.locator("#tab-chat").inner_text() == "对话"
    page.reload()
    page.wait_for_selector("[role=tab]")
    assert page.locator("#tab-chat").inner_text() == "对话"
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("html").get_attribute("data-theme") == theme
    page.evaluate("localStorage.clear()")


def test_nothing_is_wider_than_a_phone(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url, width=360, height=740)
    for model in page.locator("#model option").all_inner_texts():
        page.select_option("#model", model)
        for tab in page.locator("[role=tab]").all():
            tab.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, (model, tab.inner_text())


def test_every_field_has_a_label_and_every_button_a_name(served: Any, visit: Callable[..., Any]) -> None:
    page = visit(served.url)
    for model in page.locator("#model option").all_inner_texts():
        page.select_option("#model", model)
        for tab in page.locator("[role=tab]").all():
            tab.click()
            nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, select')]
                .filter((e) => e.checkVisibility())
                .filter((e) => !(e.textContent.trim() && e.tagName === 'BUTTON') && !e.getAttribute('aria-label') && !e.labels?.length)
                .map((e) => e.outerHTML)""")
            assert nameless == []


def test_the_key_is_asked_for_and_kept_in_this_tab(
    start: Any, models: dict[str, Any], visit: Callable[..., Any]
) -> None:
    with start({"writer": models["writer"]()}, api_keys=("secret",)) as server:
        page = visit(server.url, allowed="401", ready="#key[open]")
        page.fill("#key-field", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key .wrong")
        page.fill("#key-field", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("[role=tab]")
        page.reload()
        page.wait_for_selector("[role=tab]")
        assert page.evaluate("Object.values(sessionStorage)").count("secret") == 1
        assert "secret" not in page.evaluate("Object.values(localStorage)")


def test_a_picture_is_chosen_dropped_or_pasted_and_answered(
    start: Any, models: dict[str, Any], picture: Callable[..., str], visit: Callable[..., Any], tmp_path: Path
) -> None:
    content = base64.b64decode(picture(4).partition(",")[2])
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "b.png").write_text("no picture")
    with start({"labels": models["seer"]("classify_image"), "words": models["seer"]("caption")}) as server:
        page = visit(server.url)
        page.wait_for_selector(".drop")
        page.click("button.main")
        assert page.locator(".output").inner_text() == "Choose a picture first."
        page.set_input_files("#file-picture", tmp_path / "a.png")
        page.wait_for_selector(".ranking li")
        (expected,) = server.service.models["labels"].predict([picture(4)])
        assert page.locator(".ranking .own .label").inner_text() == expected["label"]
        assert page.locator("canvas.picture").is_visible()
        page.set_input_files("#file-picture", tmp_path / "b.png")
        page.wait_for_selector(".wrong:has-text('not a picture')")
        for name, target in (("drop", ".drop"), ("paste", "body")):
            page.evaluate("document.querySelector('.output').replaceChildren()")
            page.evaluate(
                """([name, target, content]) => {
                  const held = new DataTransfer();
                  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                  held.items.add(new File([bytes], "a.png", { type: "image/png" }));
                  const options = { bubbles: true, cancelable: true, dataTransfer: held, clipboardData: held };
                  const kind = name === "drop" ? DragEvent : ClipboardEvent;
                  document.querySelector(target).dispatchEvent(new kind(name, options));
                }""",
                [name, target, base64.b64encode(content).decode()],
            )
            page.wait_for_selector(".ranking li")
        page.select_option("#model", "words")
        page.wait_for_selector(".drop:not(:has(canvas:visible))")
        page.set_input_files("#file-picture", tmp_path / "a.png")
        page.wait_for_selector(".output:not(.writing) .written")
        (expected,) = server.service.models["words"].predict([picture(4)])
        said = page.locator(".output .written").inner_text()
        assert said.split() == (expected["text"] or "The model wrote nothing.").split()


def test_pictures_are_boxed_matched_and_painted(
    start: Any, models: dict[str, Any], picture: Callable[..., str], visit: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(base64.b64decode(picture(4, 40).partition(",")[2]))
    served = {"boxes": "detect", "matches": "match_image_text", "paints": "generate_image"}
    with start({name: models["seer"](task) for name, task in served.items()}) as server:
        page = visit(server.url)
        page.wait_for_selector(".drop")
        page.set_input_files("#file-picture", tmp_path / "a.png")
        (found,) = server.service.models["boxes"].predict([picture(4, 40)])
        sure = [box for box in found["boxes"] if box["score"] >= 0.5]
        page.wait_for_selector(
            ".output:not(.writing) canvas.boxed" if sure else ".output:has-text('nothing that it is sure of')"
        )
        assert page.locator(".ranking li").count() == len(sure)
        page.select_option("#model", "matches")
        page.wait_for_selector("#field-candidates")
        page.set_input_files("#file-picture", tmp_path / "a.png")
        page.wait_for_selector(".drop canvas:visible")
        page.click("button.main")
        assert page.locator(".output").inner_text() == "It needs a picture and at least two texts, one a line."
        page.fill("#field-candidates", f"a cat\n{MARKUP}\na dog")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".ranking li:nth-child(3)")
        assert page.locator(".ranking .label").all_inner_texts().count(MARKUP) == 1
        page.select_option("#model", "paints")
        page.wait_for_selector("#field-paint")
        page.select_option("#field-paint", "b")
        page.click("button.main")
        page.wait_for_selector(".painted img:nth-child(4)")
        assert page.evaluate("[...document.querySelectorAll('.painted img')].every((one) => one.naturalWidth === 6)")
        first = page.locator(".painted img").first.get_attribute("src")
        (expected,) = server.service.models["paints"].predict([{"label": "b", "seed": 1}])
        assert first == expected["image"]


def test_items_are_found_taken_and_followed_by_others(
    start: Any, models: dict[str, Any], visit: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"item": f"film-{n}", "text": f"Film {n} {MARKUP}"} for n in range(30)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with start({"films": models["recommender"](tmp_path)}) as server:
        page = visit(server.url, width=390, height=844)
        page.wait_for_selector(".found button")
        page.fill("#field-item", "film 17")
        page.wait_for_selector(".found li:only-child:has-text('Film 17')")
        page.keyboard.press("Enter")
        page.wait_for_selector(".history .item:has-text('Film 17')")
        page.wait_for_selector(".found li:nth-child(5)")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_selector(".history .item:nth-child(2)")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".recommended .item:nth-child(10)")
        history = page.locator(".history small").all_inner_texts()
        (expected,) = server.service.models["films"].predict([{"history": history}])
        assert page.locator(".recommended small").all_inner_texts() == [one["item"] for one in expected["items"]]
        assert MARKUP in page.locator(".recommended .what").first.inner_text()
        page.locator(".recommended button").first.click()
        assert page.locator(".history .item").count() == 3
        page.locator(".history button").first.click()
        assert page.locator(".history .item").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("window.hit") is None


def test_curves_grow_while_a_run_goes_on(
    start: Any, models: dict[str, Any], visit: Callable[..., Any], tmp_path: Path
) -> None:
    metrics = tmp_path / "<b>run<b>" / "metrics.jsonl"
    metrics.parent.mkdir()
    (metrics.parent / "recipe.yaml").write_text("name: run\ntask: caption\n")
    line = '{{"step": {0}, "loss": {1}, "lr": 0.1, "tokens_per_second": 5, "tokens": 8, "seconds": 1}}\n'
    metrics.write_text(line.format(1, 3.5) + line.format(2, 3.25) + '{"step": 2, "validation_loss": 3.125}\n')
    with start({"writer": models["writer"]()}, runs=tmp_path) as server:
        page = visit(server.url)
        page.click("#tab-runs")
        page.wait_for_selector(".chart svg")
        assert page.locator(".chart h3").all_inner_texts() == ["Loss", "Learning rate", "Speed, images per second"]
        assert "validation 3.13" in page.locator(".reading").first.inner_text()
        assert page.locator(".runname").inner_text() == "<b>run<b>"
        page.locator(".chart svg").first.focus()
        page.keyboard.press("Home")
        assert "training (smoothed) 3.5" in page.locator(".reading").first.inner_text()
        with metrics.open("a") as file:
            file.write(line.format(3, 2.75))
        page.wait_for_selector(".charts p:has-text('step 3 · 8 images')")
        assert page.evaluate("document.activeElement.tagName") == "svg"  # where it was
        assert "training (smoothed) 3.5" in page.locator(".reading").first.inner_text()
