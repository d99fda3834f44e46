"""Boxes in pictures from a COCO file to a report, and a detector at the command line."""

import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import formary
from formary.pipeline.run import run

RECIPE = """
name: tiny
task: detect
data: {sources: [instances.json], columns: {image: "photos/{image}"}, split: {validation: 0.1, test: 0.3}}
model: {preset: yolos-mini, size: 1x32, switches: {image_size: 16, patch_size: 8, detection_tokens: 4}}
train: {steps: 12, batch: 4, validate_every: 6, best: metric, augment: {flip: true, mosaic: 0.5}}
evaluate: {bootstrap: 100}
machine: {threads: 1, device: cpu, precision: float32}
"""
CATEGORIES = [{"id": 12, "name": "<b>"}, {"id": 90, "name": "dark"}]


def coco(folder, name="instances.json", pictures=30):
    """Photos of 20 x 16 pixels with a bright or dark square, and the file that says where."""
    rng = np.random.default_rng(1)
    images, annotations = [], []
    (folder / "photos").mkdir(exist_ok=True)
    for number in range(pictures):
        picture = rng.integers(100, 140, (16, 20, 3), dtype=np.uint8)
        left, top = int(rng.integers(0, 12)), int(rng.integers(0, 8))
        picture[top : top + 7, left : left + 7] = 250 if number % 2 else 5
        Image.fromarray(picture).save(folder / "photos" / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png"})
        category = 12 if number % 2 else 90
        annotations.append(
            {"id": number + 1, "image_id": 100 + number, "category_id": category, "bbox": [left, top, 7, 7]}
        )
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / name).write_text(json.dumps(document))
    return document


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect")
    coco(folder)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder, run(folder / "recipe.yaml", overrides=[], folder=folder / "run", console=Console(quiet=True))


def test_a_run_is_measured_as_coco_does_beside_the_commonest_boxes(detector):
    folder, result = detector
    assert [metric["metric"] for metric in result.metrics] == ["map@50:95", "map@50", "map@75", "ar@100"]
    assert "commonest boxes" in result.metrics[0]["baselines"] and "as COCO" in result.metrics[0]["protocol"]
    settings = json.loads((folder / "run/model/formary.json").read_text())["settings"]
    assert settings["categories"] == {"<b>": 12, "dark": 90}


def test_the_report_draws_boxes_and_escapes_their_names(detector):
    folder, _ = detector
    page = (folder / "run/report.html").read_text(encoding="utf-8")
    assert page.count('<image href="data:image/png;base64,') >= 3 and 'class="box true"' in page
    assert (
        "img-src data:" in page
        and "&lt;b&gt;" in page
        and "<b>" not in page.split('class="scenes"')[1].split("</figure>")[0]
    )


def test_boxes_are_printed_and_written_as_coco_results(detector, command, tmp_path):
    folder, result = detector
    document = {
        name: part
        for name, part in json.loads((folder / "instances.json").read_text()).items()
        if name != "annotations"
    }
    (folder / "asked.json").write_text(json.dumps(document))
    out = tmp_path / "results.json"
    arguments = ("predict", result.model, folder / "asked.json", "--column", "image=photos/{image}")
    assert command(*arguments, "--out", out).exit_code == 0
    results = json.loads(out.read_text())
    assert {entry["image_id"] for entry in results} <= set(range(100, 130))
    assert {entry["category_id"] for entry in results} <= {12, 90} and len(results[0]["bbox"]) == 4
    printed = command(*arguments)
    assert printed.exit_code == 0 and len(printed.stdout.splitlines()) == 30
    answer = json.loads(command(*arguments, "--json").stdout.splitlines()[0])
    assert answer["boxes"] and answer["boxes"][0].keys() == {"label", "score", "box"}


def test_pycocotools_gives_the_results_the_figures_of_the_evaluation(detector, tmp_path):
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO

    from formary.evaluate import detections
    from formary.pipeline.measure import rows_for
    from formary.recipe.schema import Evaluate

    folder, result = detector
    model = formary.load(result.model)
    rows, _ = rows_for(model.task, str(folder / "instances.json"), columns={"image": "photos/{image}"}, answers=True)
    answers = model.predict(rows, precision="float32")
    (tmp_path / "results.json").write_text(json.dumps(model.task.results(rows, answers)))
    truth = COCO(str(folder / "instances.json"))
    for annotation in truth.dataset["annotations"]:
        annotation |= {"iscrowd": 0, "area": 49}
    measured = cocoeval.COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    ours = detections.metrics(rows, {"model": answers}, settings=Evaluate(bootstrap=100), where="all")
    expected = [*measured.stats[:3], measured.stats[8]]
    assert [metric["model"]["value"] for metric in ours] == pytest.approx(expected, abs=1e-9)


def test_a_detector_is_measured_on_a_file_of_its_own(detector, command):
    folder, result = detector
    coco(folder / "photos", "beside.json")  # whose pictures lie in photos/photos
    document = json.loads((folder / "photos/beside.json").read_text())
    document["annotations"][3]["bbox"] = [15, 3, 9, 4]
    (folder / "photos/beside.json").write_text(json.dumps(document))
    said = command("evaluate", result.model, folder / "photos/beside.json")
    assert said.exit_code == 2
    assert "(id 103), box 1: [15, 3, 9, 4] lies outside of the picture of 20 x 16 pixels" in said.stderr


def test_pictures_that_are_missing_are_left_out_named_and_counted(tmp_path):
    coco(tmp_path)
    (tmp_path / "photos/4.png").unlink()
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run(tmp_path / "recipe.yaml", overrides=[], folder=tmp_path / "run", console=Console(quiet=True), until="documents")
    story = (tmp_path / "run/data/documents/story.json").read_text()
    assert "there is no such file" in story and "4.png" in story
