"""A run: what it leaves, what it does again and what not, and that neither Ctrl-C, a kill nor a full disk harms it."""

import base64
import errno
import hashlib
import html
import io
import itertools
import json
import math
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from rich.console import Console

import formary
from formary import durable
from formary.errors import FormaryError, RecipeError, StorageError
from formary.pipeline import stages
from formary.pipeline.run import file_fingerprints, stage_keys
from formary.recipe import read

STAGES = ("documents", "tokenizer", "tokens", "train", "evaluate", "report")


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".writing-")]


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_every_documented_file(finished):
    files = {path.relative_to(finished.run_folder).as_posix() for path in finished.run_folder.rglob("*")}
    assert files >= {
        "recipe.yaml",
        "data/documents/train.jsonl",
        "data/documents/story.json",
        "data/tokenizer/tokenizer.json",
        "data/tokens/test/tokens.bin",
        "checkpoints",
        "model/config.json",
        "model/model.safetensors",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/README.md",
        "model/formary.json",
        "metrics.jsonl",
        "tensorboard",
        "evaluation.json",
        "report.html",
        "log.txt",
    }
    assert not leftovers(finished.run_folder)
    assert any("tfevents" in path.name for path in (finished.run_folder / "tensorboard").iterdir())


def test_the_kept_recipe_is_the_one_that_ran(finished):
    assert read(finished.run_folder / "recipe.yaml") == read(finished.recipe)


def test_every_json_file_is_json_without_infinities(finished):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for path in finished.run_folder.rglob("*.json*"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("causal_lm", "AutoModelForCausalLM"),
        ("masked_lm", "AutoModelForMaskedLM"),
        ("denoise", "AutoModelForSeq2SeqLM"),
    ],
)
def test_transformers_opens_the_model_and_agrees(finished_runs, task, kind):
    import transformers

    folder = finished_runs(task).model
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    ours = formary.load(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the dog ran after two birds"
    ids = words(text).input_ids
    assert ids == ours.tokenizer.backend.encode(text).ids
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        if task == "denoise":
            target = torch.tensor([[ours.config.decoder_start_id, *ids[:5]]])
            expected = theirs(input_ids=tokens, decoder_input_ids=target).logits
            logits = ours.network.head(ours.network(tokens, target))
        else:
            expected = theirs(input_ids=tokens).logits
            logits = ours.network.head(ours.network(tokens))
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "denoise"])
def test_every_figure_in_the_report_comes_from_the_run(finished_runs, task):
    from formary.evaluate.interval import Interval
    from formary.pipeline.report import decimals_for, number

    folder = finished_runs(task).run_folder
    page = (folder / "report.html").read_text()
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert metrics and all(metric["verdicts"] for metric in metrics)
    for metric in metrics:
        interval = Interval.from_json(metric["model"])
        for value in (interval.value, interval.low, interval.high):
            assert number(value, decimals_for(interval)) in page
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min(record["validation_loss"] for record in records if "validation_loss" in record)
    assert f"{best:.2f}" in page
    story = json.loads((folder / "data/documents/story.json").read_text())
    assert f"{story['rows_read']:,} documents" in page
    model = formary.load(folder / "model")
    parameters = sum(weight.numel() for weight in model.network.parameters())
    assert f"{parameters / 1e3:.3g} k" in page and str(model.config.vocab_size) in page


def test_the_seconds_in_the_report_are_those_of_the_stages(finished):
    done = json.loads((finished.run_folder / "stages.json").read_text())
    page = (finished.run_folder / "report.html").read_text()
    assert set(done) == set(STAGES) and f"{done['train']['seconds']:.1f}\u00a0s" in page.replace(" s", "\u00a0s")


def test_a_page_of_hostile_text_holds_no_script(ran):
    bad = "<script>alert(1)</script>"
    text = ran.folder / "text.txt"
    text.write_text(text.read_text().replace("the cat", f"the {bad} cat"))
    ran.run(f'description="{bad}"', "train.sample_every=3", "train.context=64", f'generate.prompts=["{bad}"]')
    assert bad in (ran.run_folder / "evaluation.json").read_text()
    page = (ran.run_folder / "report.html").read_text()
    assert page.lower().count("<script") == 1  # the report's own, the only one its policy lets run
    own = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(page) and "alert(1)" not in own


def test_the_name_of_a_recipe_cannot_lead_out_of_the_runs_folder(place):
    for name in ("../out", "a/../../out", "/out", ".."):
        with pytest.raises(RecipeError, match="name"):
            place.run(f'name="{name}"')


# --- what it says ---------------------------------------------------------------------------------------------------


def said_by(place, *, terminal, width=60):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with warnings.catch_warnings():
        for kind in (UserWarning, FutureWarning, RuntimeWarning, DeprecationWarning):
            warnings.simplefilter("error", kind)
        place.run("train.sample_every=3", console=console)
    return out.getvalue()


def test_a_piped_run_warns_of_nothing_and_says_each_thing_in_one_unbroken_line(place):
    said = said_by(place, terminal=False)
    assert "\x1b" not in said and "\r" not in said
    for start in (
        "tiny: a tiny run -> ",
        "  train  ",
        "step 3: validation loss",
        "  bits per byte",
        "  measured on: test",
    ):
        assert sum(line.startswith(start) for line in said.splitlines()) == 1
    assert all(f"\n{stage} ─" in said for stage in STAGES)
    assert "\n\n" not in said


def test_the_log_has_what_was_said_and_no_colours(place):
    said = said_by(place, terminal=True)
    log = (place.run_folder / "log.txt").read_text()
    assert "\x1b" in said and "\x1b" not in log and "\r" not in log
    assert str(place.run_folder) in said  # not broken at the width of the terminal
    assert "step 6: validation loss" in log and "it writes: " in log and "step 1/6" not in log


def test_a_baseline_that_wins_is_said_to_win(finished):
    metrics = {
        entry["metric"]: entry for entry in json.loads((finished.run_folder / "evaluation.json").read_text())["metrics"]
    }
    loss = metrics["loss"]
    assert loss["verdicts"]["5-gram"] == "worse" and loss["baselines"]["5-gram"]["value"] < loss["model"]["value"]
    assert f"worse than 5-gram {loss['baselines']['5-gram']['value']:.3f}" in loss["says"]


# --- what is done again ---------------------------------------------------------------------------------------------


def keys(place, *overrides):
    recipe = read(place.recipe, overrides)
    return stage_keys(recipe, file_fingerprints(recipe, place.folder, place.run_folder).values())


def redone(place, *overrides):
    before = json.loads((place.run_folder / "stages.json").read_text())
    after = keys(place, *overrides)
    return tuple(stage for stage in STAGES if before[stage]["key"] != after[stage])


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("data.clean.min_chars=5", "documents"),
        ("data.split.salt=other", "documents"),
        ("data.tokenizer.kind=bytes", "tokenizer"),
        ("data.words=tokenizer", "tokens"),
        ("train.steps=7", "train"),
        ("train.optimiser.lr=0.01", "train"),
        ("model.size=1x48", "train"),
        ("generate.temperature=0.5", "evaluate"),
        ("generate.max_tokens=5", "evaluate"),
        ('generate.prompts=["a dog"]', "evaluate"),
        ("evaluate.bootstrap=200", "evaluate"),
        ("description=other", "report"),
        ("train.keep=1", None),
        ("train.save_every=1", None),
        ("train.sample_every=2", None),
        ("machine.threads=2", None),
    ],
)
def test_a_change_redoes_what_depends_on_it_and_nothing_before(finished, change, first):
    assert redone(finished, change) == (STAGES[STAGES.index(first) :] if first else ())


def test_a_second_run_has_nothing_to_do(ran):
    out = io.StringIO()
    result = ran.run(console=Console(file=out))
    assert result.did == () and result.metrics and "nothing to do" in out.getvalue()


def test_only_the_stages_that_changed_run(ran):
    before = ran.weights()
    assert ran.run("generate.max_tokens=5", "generate.temperature=0").did == ("evaluate", "report")
    defaults = json.loads((ran.model / "generation_config.json").read_text())
    assert ran.weights() == before and defaults["max_new_tokens"] == 5 and defaults["do_sample"] is False
    assert defaults["eos_token_id"] == formary.load(ran.model).config.eos_id
    assert ran.run("train.steps=4").did == ("train", "evaluate", "report")
    assert ran.weights() != before


def test_the_content_of_a_data_file_counts_and_its_date_does_not(ran):
    text = ran.folder / "text.txt"
    os.utime(text, (1, 1))
    assert redone(ran) == ()
    changed = text.read_text().replace("cat", "car", 1)
    text.write_text(changed)
    assert redone(ran) == STAGES


def test_what_was_deleted_is_made_again(ran):
    before = ran.weights()
    (ran.model / "model.safetensors").unlink()
    (ran.run_folder / "report.html").unlink()
    assert ran.run().did == ("train", "report") and ran.weights() == before


def test_how_often_it_saves_and_samples_does_not_change_the_model(finished, place):
    place.run("train.save_every=1", "train.keep=1", "train.sample_every=1", until="train")
    assert place.weights() == finished.weights()
    (identity,) = (place.run_folder / "checkpoints").iterdir()
    best = json.loads((place.model / "formary.json").read_text())["best_step"]
    assert {path.name for path in identity.glob("step-*")} == {"step-00000006", f"step-{best:08d}"}


def test_going_back_after_another_training_was_stopped_mixes_nothing(ran):
    before, records = ran.weights(), (ran.run_folder / "metrics.jsonl").read_text()
    with stopped_at("formary.train.loop.gradient", call=5), pytest.raises(KeyboardInterrupt):
        ran.run("train.optimiser.lr=0.1")
    with pytest.raises(RecipeError, match=r"begin anew: delete .*checkpoints"):
        ran.run()
    shutil.rmtree(ran.run_folder / "checkpoints")
    assert ran.run().did == ("train",) and ran.weights() == before

    def losses(text):
        return [record.get("loss") for record in map(json.loads, text.splitlines())]

    assert losses((ran.run_folder / "metrics.jsonl").read_text()) == losses(records)


# --- Ctrl-C, kill, full disk ----------------------------------------------------------------------------------------


class stopped_at:  # reads as a phrase
    """Inside the block a function raises KeyboardInterrupt at its n-th call, as Ctrl-C in the middle of it would."""

    def __init__(self, target, *, call):
        self.target, self.call = target, call
        self.own = pytest.MonkeyPatch()

    def __enter__(self):
        original = pkgutil.resolve_name(self.target)
        calls = itertools.count(1)

        def stand_in(*arguments, **options):
            if next(calls) == self.call:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        self.own.setattr(self.target, stand_in)

    def __exit__(self, *error):
        self.own.undo()


MIDDLES = [
    ("documents", "formary.data.documents._Sink.write", 30),
    ("tokenizer", "formary.data.tokenizer.Tokenizer.save", 1),
    ("tokens", "formary.data.shards._Files.write", 6),
    ("train", "formary.train.loop.gradient", 5),
    ("train", "formary.train.loop.validation_loss", 2),
    ("train", "formary.train.checkpoint.save_file", 5),
    ("train", "formary.hub.checkpoint.write_json", 2),
    ("evaluate", "formary.evaluate.language_model.paired_difference", 2),
    ("report", "formary.pipeline.card.render_model_card", 1),
]


@pytest.mark.parametrize(("stage", "target", "call"), MIDDLES)
def test_ctrl_c_in_the_middle_of_any_stage_leaves_nothing_half_written(finished, place, command, stage, target, call):
    with stopped_at(target, call=call):
        result = command("run", place.recipe, "--folder", place.run_folder)
    assert result.exit_code == 130, result.stderr
    assert "the same command goes on" in result.stderr and "Traceback" not in result.stderr
    assert not leftovers(place.run_folder)
    done = json.loads((place.run_folder / "stages.json").read_text()) if stage != "documents" else {}
    assert tuple(done) == STAGES[: STAGES.index(stage)]
    assert place.run().did == STAGES[STAGES.index(stage) :]
    assert place.weights() == finished.weights()


def test_a_signal_in_training_saves_first_and_the_records_have_no_gap(finished, place, command, monkeypatch):
    from formary.train import loop

    original, calls = loop.gradient, iter(range(1, 100))

    def signalled(*arguments):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "gradient", signalled)
    result = command("run", place.recipe, "--folder", place.run_folder)
    assert result.exit_code == 130 and result.stderr.startswith("stopped at step 4 and saved")
    place.run()
    assert place.weights() == finished.weights()
    records = [json.loads(line) for line in (place.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_early_stopping_holds_when_the_stopped_run_is_resumed(place):
    settings = ("train.steps=40", "train.validate_every=1", "train.patience=2", "train.optimiser.lr=2.0")
    place.run(*settings, until="train")
    before, facts = place.weights(), json.loads((place.model / "formary.json").read_text())
    assert facts["step"] < 40
    (place.model / "model.safetensors").unlink()
    place.run(*settings, until="train")
    assert place.weights() == before and json.loads((place.model / "formary.json").read_text()) == facts


def test_a_training_that_is_killed_resumes_to_the_same_bytes(finished, place):
    program = """
        import os, signal, sys
        from formary.pipeline.run import run
        from formary.train import loop
        gradient, calls = loop.gradient, iter(range(1, 100))
        def killed(*arguments):
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return gradient(*arguments)
        loop.gradient = killed
        run(sys.argv[1], folder=__import__("pathlib").Path(sys.argv[2]))
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(place.recipe), str(place.run_folder)],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    out = io.StringIO()
    result = place.run(console=Console(file=out, width=200))
    assert result.did == ("train", "evaluate", "report") and re.search("resuming from step [234]", out.getvalue())
    assert place.weights() == finished.weights()
    assert (place.run_folder / "evaluation.json").read_bytes() == (finished.run_folder / "evaluation.json").read_bytes()


FULL = [
    ("train.jsonl", "data.clean.min_chars=5", lambda path: "train.jsonl" in path.name, "data/documents/train.jsonl"),
    ("tokens", "data.words=tokenizer", lambda path: path.name == "tokens.bin", "data/tokens/train/tokens.bin"),
    ("step-", "train.steps=7", lambda path: path.name == "optimiser.safetensors", "model/model.safetensors"),
    ("model", "train.steps=4", lambda path: path.name == "generation_config.json", "model/model.safetensors"),
    ("evaluation.json", "evaluate.bootstrap=200", lambda path: "evaluation.json" in path.name, "evaluation.json"),
    ("report.html", "description=other", lambda path: "report.html" in path.name, "report.html"),
]


@pytest.mark.parametrize(("named", "change", "where", "kept"), FULL)
def test_a_full_disk_leaves_the_old_files_and_says_so(ran, command, monkeypatch, named, change, where, kept):
    before = (ran.run_folder / kept).read_bytes()
    flush = durable._flush

    def full(path):
        if where(path) and ".writing-" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(durable, "_flush", full)
    result = command("run", ran.recipe, "--folder", ran.run_folder, "--set", change)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert named in line and "No space left on device" in line and "free some space" in line
    assert (ran.run_folder / kept).read_bytes() == before and not leftovers(ran.run_folder)
    monkeypatch.undo()
    assert ran.run(change).did


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_checkpoint_that_the_system_refuses_to_write_is_an_error_in_one_line(place):
    place.run(until="tokens")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(StorageError, match=r"step-0{7}2: could not be written"):
            place.run(until="train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not leftovers(place.run_folder)


def test_leftovers_of_a_kill_are_gone_after_the_next_start(ran):
    for name in (".writing-1-stages.json", "data/documents/.writing-1-train.jsonl", "model/.writing-1-README.md"):
        (ran.run_folder / name).write_text("half")
    (ran.run_folder / "data/tokens/.writing-1-train").mkdir()
    assert ran.run().did == () and not leftovers(ran.run_folder)


# --- splits without rows --------------------------------------------------------------------------------------------


def test_without_a_test_split_validation_is_measured_and_that_is_said(place):
    out = io.StringIO()
    result = place.run("data.split.test=0", console=Console(file=out))
    assert json.loads((place.run_folder / "evaluation.json").read_text())["split"] == "validation"
    assert "no test text: measured on validation" in out.getvalue() and result.report.exists()


def test_without_any_held_out_text_the_report_says_that_nothing_was_measured(place):
    out = io.StringIO()
    result = place.run("data.split.test=0", "data.split.validation=0", console=Console(file=out))
    assert result.metrics == () and "nothing is measured" in out.getvalue()
    page = result.report.read_text()
    assert "nothing was measured" in page and "nan" not in page.lower().split()
    facts = json.loads((place.model / "formary.json").read_text())
    assert facts["best_step"] == facts["step"] == 6 and "best_loss" not in facts


def test_a_prompt_that_does_not_fit_is_refused_before_training(place, monkeypatch):
    monkeypatch.setattr("formary.train.loop.train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(RecipeError, match=r"generate\.prompts: 'the.*40 tokens and the context is 32"):
        place.run(f'generate.prompts=["{"the " * 10}"]')


def test_a_prompt_without_a_mask_is_refused_before_training(finished_runs, tmp_path):
    masked = finished_runs("masked_lm").copy(tmp_path)
    with pytest.raises(RecipeError, match=r"has no \[MASK\]"):
        masked.run('generate.prompts=["the cat"]', "train.steps=3")


def test_another_process_in_the_run_folder_is_noticed(ran):
    import fcntl

    with (ran.run_folder / "log.txt").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(FormaryError, match="another formary process"):
            ran.run()
    assert ran.run().did == ()


def test_a_recipe_object_runs_as_well(place):
    result = formary.run(
        read(place.recipe), base=place.folder, folder=place.run_folder, until="documents", console=Console(quiet=True)
    )
    assert result.did == ("documents",)


def test_the_energy_is_said_to_be_an_estimate(finished):
    assert re.search(r"estimate|not measured", (finished.run_folder / "report.html").read_text())


def test_the_model_beats_chance(finished):
    metrics = json.loads((finished.run_folder / "evaluation.json").read_text())["metrics"]
    vocabulary = formary.load(finished.model).config.vocab_size
    loss = next(entry for entry in metrics if entry["metric"] == "loss")
    assert loss["model"]["high"] < math.log(vocabulary)


def test_every_stage_names_what_it_leaves(finished):
    assert all(stage.leaves for stage in stages.STAGES)
    for stage in stages.stages_of(read(finished.run_folder / "recipe.yaml")):
        assert all((finished.run_folder / name).exists() for name in stage.leaves)


@pytest.mark.parametrize("model", ["{preset: gpt-mni}", "{switches: {layrs: 2}}", "{switches: {heads: 5}}"])
def test_a_wrong_model_is_refused_before_the_data_work(tmp_path, model):
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    (tmp_path / "r.yaml").write_text(f"{{name: r, data: {{sources: [text.txt]}}, model: {model}}}")
    with pytest.raises(FormaryError):
        formary.run(tmp_path / "r.yaml", folder=tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out" / "data" / "documents").exists()
