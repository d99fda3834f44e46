"""Pictures over HTTP: sent as data URIs and answered; paths are not followed, bombs and broken ones are refused."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from formary.serve import limits

Picture = Callable[..., str]
TASKS = ("classify_image", "caption", "detect", "match_image_text")


@pytest.fixture(scope="module")
def seeing() -> Iterator[Any]:
    """A server with one model of each task on pictures."""
    from .conftest import running, seer

    with running({task: seer(task) for task in TASKS}) as made:
        yield made


def uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that unpacks to side x side pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    squeezer = zlib.compressobj(9)
    line = bytes(side // 8 + 2)
    packed = b"".join(squeezer.compress(line) for _ in range(side)) + squeezer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("task", TASKS)
def test_pictures_are_answered_as_the_model_answers_them(seeing: Any, picture: Picture, task: str) -> None:
    rows = [picture(1), {"image": picture(2, 30)}, {"image": picture(3, 8)}]
    more = {"max_tokens": 6} if task == "caption" else {}
    found = seeing.post(f"/v1/predict/{task}", {"inputs": rows, **more})
    assert found.status_code == 200, found.text
    alone = seeing.service.models[task].predict(rows, **more)
    for answer, expected in zip(found.json()["answers"], alone, strict=True):
        if task == "caption":
            assert answer == expected
        elif task == "detect":
            same_boxes(answer, expected)
        elif task == "match_image_text":
            assert answer["image_vector"] == pytest.approx(expected["image_vector"], abs=1e-4)
        else:
            assert answer["label"] == expected["label"]
            assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def same_boxes(answer: Any, expected: Any) -> None:
    assert len(answer["boxes"]) == len(expected["boxes"]) > 0
    for one, other in zip(answer["boxes"], expected["boxes"]):
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)


def test_boxes_are_in_the_pixels_of_the_picture_that_was_sent(seeing: Any) -> None:
    large = np.random.default_rng(5).integers(0, 256, (60, 200, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(large).save(held, "PNG")
    row = {"image": uri(held.getvalue()), "sent_size": [1, 1]}  # which only the server may say
    (answer,) = seeing.post("/v1/predict/detect", {"inputs": [row]}).json()["answers"]
    (expected,) = seeing.service.models["detect"].predict([row["image"]])
    same_boxes(answer, expected)
    first = max(answer["boxes"], key=lambda box: box["score"])["box"]
    assert max(first[0] + first[2], first[2]) > 20 and first[1] + first[3] <= 60.01
    assert first == pytest.approx(max(expected["boxes"], key=lambda box: box["score"])["box"], abs=1.0)


def test_a_photograph_larger_than_a_text_may_be_is_taken(seeing: Any) -> None:
    held = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(held, "JPEG", quality=90)
    sent = uri(held.getvalue(), "jpeg")
    assert limits.ROW_CHARACTERS < len(sent) < limits.BODY_BYTES
    assert seeing.post("/v1/predict/classify_image", {"inputs": [sent]}).status_code == 200
    refused = seeing.post("/v1/predict/classify_image", {"inputs": [{"image": sent, "note": "x" * 300_000}]})
    assert refused.status_code == 400 and "characters are more than" in refused.text


@pytest.mark.parametrize("task", TASKS)
def test_paths_are_not_followed(seeing: Any, picture: Picture, task: str, tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(base64.b64decode(picture().partition(",")[2]))
    plain = (str(path), f"file://{path}") if task != "match_image_text" else ()  # which takes them for texts
    for given in (*plain, {"image": str(path)}, {"image": {"path": str(path)}}):
        refused = seeing.post(f"/v1/predict/{task}", {"inputs": [picture(), given]})
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == "inputs[1]", error
        assert "data:image/png;base64" in error["message"]
        assert "no such file" not in error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        "data:image/png;base64,",
        "data:image/png;base64,%%%",
        "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
        "data:text/html;base64,PGI+",
        uri(b"<b>no picture</b>"),
        uri(b"\x89PNG\r\n\x1a\nbroken"),
        uri(bomb(64)[:40]),
        "",
        None,
        7,
        {"bytes": "abc"},
    ],
    ids=str,
)
def test_what_is_no_picture_is_a_400_that_names_it(seeing: Any, sent: Any) -> None:
    refused = seeing.post("/v1/predict/classify_image", {"inputs": [{"image": sent}]})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "inputs[0]"


def test_a_row_without_a_picture_is_a_400(seeing: Any) -> None:
    refused = seeing.post("/v1/predict/classify_image", {"inputs": [{"text": "a"}]})
    assert refused.status_code == 400 and "a picture is a data URI" in refused.json()["error"]["message"]


def test_a_bomb_is_refused_before_it_is_unpacked(seeing: Any, picture: Picture) -> None:
    packed = uri(bomb(20_000))
    assert len(packed) < 200_000
    refused = seeing.post("/v1/predict/classify_image", {"inputs": [packed]})
    assert refused.status_code == 400 and "more than the 64 million" in refused.json()["error"]["message"]
    assert seeing.post("/v1/predict/classify_image", {"inputs": [picture()]}).status_code == 200


def test_many_bombs_that_are_each_allowed_are_refused_together(seeing: Any) -> None:
    packed = uri(bomb(5_000))
    refused = seeing.post("/v1/predict/classify_image", {"inputs": [packed] * 4})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "inputs[2]"


def test_a_model_that_describes_pictures_writes_no_other_texts(seeing: Any) -> None:
    told = {one["id"]: one for one in seeing.client.get("/v1/models").json()["data"]}
    assert told["caption"]["abilities"] == ["predict"] and told["caption"]["asks"] == ["image"]
    refused = seeing.post("/v1/completions", {"model": "caption", "prompt": "a"})
    assert refused.status_code == 400 and "/v1/predict/caption" in refused.json()["error"]["message"]


def test_a_model_without_words_has_no_tokens(seeing: Any) -> None:
    refused = seeing.post("/tokenize", {"model": "classify_image", "prompt": "a"})
    assert refused.status_code == 400 and "reads no text" in refused.json()["error"]["message"]


def test_a_model_that_paints_takes_labels_and_beginnings_of_pictures(
    start: Any, models: Any, picture: Picture, tmp_path: Any
) -> None:
    with start({"painter": models["seer"]("generate_image")}) as made:
        asked = ["a", {"label": "b", "seed": 1}, {"image": picture(3)}]
        found = made.post("/v1/predict/painter", {"inputs": asked})
        assert found.status_code == 200, found.text
        assert all(answer["image"].startswith("data:image/png;base64,") for answer in found.json()["answers"])
        refused = made.post("/v1/predict/painter", {"inputs": ["a", {"image": str(tmp_path / "a.png")}]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "inputs[1]"
        (told,) = made.client.get("/v1/models").json()["data"]
        assert told["abilities"] == ["predict"]
        (shown,) = made.client.get("/playground/models").json()["models"]
        assert shown["tabs"] == ["paint"] and shown["labels"] == ["a", "b"]


def test_captions_take_the_options_of_writing(seeing: Any, picture: Picture) -> None:
    body = {"inputs": [picture(1), picture(2)], "beams": 2, "max_tokens": 5}
    found = seeing.post("/v1/predict/caption", body)
    assert found.status_code == 200
    assert found.json()["answers"] == seeing.service.models["caption"].predict(body["inputs"], beams=2, max_tokens=5)


def test_the_description_says_how_pictures_are_sent(seeing: Any) -> None:
    told = json.dumps(seeing.client.get("/openapi.json").json()["paths"]["/v1/predict/{model}"])
    assert "data:image/png;base64" in told and "paths are refused" in told


def test_a_model_that_matches_takes_pictures_texts_and_candidates(seeing: Any, picture: Picture) -> None:
    inputs = [
        {"image": picture(1), "candidates": ["a cat", "a dog"]},
        "a dog",
        {"image": picture(1), "text": "a cat"},
    ]
    found = seeing.post("/v1/predict/match_image_text", {"inputs": inputs})
    assert found.status_code == 200, found.text
    chosen, read, both = found.json()["answers"]
    assert set(chosen["probabilities"]) == {"a cat", "a dog"} and set(read) == {"text_vector"}
    (expected,) = seeing.service.models["match_image_text"].predict(inputs[2:])
    assert both["similarity"] == pytest.approx(expected["similarity"], abs=1e-4)
    said = seeing.post("/v1/embeddings", {"model": "match_image_text", "input": ["a dog"]}).json()["data"]
    assert said[0]["embedding"] == pytest.approx(read["text_vector"], abs=1e-4)
    refused = seeing.post("/v1/predict/match_image_text", {"inputs": [inputs[1], {**inputs[0], "candidates": ["one"]}]})
    error = refused.json()["error"]
    assert refused.status_code == 400 and "row 2: field 'candidates'" in error["message"]
