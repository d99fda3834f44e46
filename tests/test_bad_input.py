"""Everything a user can get wrong is one line on stderr that names it, exit code 2, and no traceback."""

import fcntl
import os
import pickle
import zipfile

import pytest
import torch


@pytest.fixture
def refused(command):
    """Run a command that has to be refused; gives its one line."""

    def run(*arguments, input=None):
        result = command(*arguments, input=input)
        assert result.exit_code == 2, (result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and "Traceback" not in result.output
        return line

    return run


@pytest.fixture
def run(place, refused):
    """Run the recipe with changed fields; it has to be refused."""
    return lambda *changes: refused(
        "run", place.recipe, "--folder", place.run_folder, *(word for change in changes for word in ("--set", change))
    )


# --- data -----------------------------------------------------------------------------------------------------------


def test_an_empty_file(place, run):
    (place.folder / "text.txt").write_text("")
    assert "text.txt" in (said := run()) and "empty" in said


def test_a_file_of_blank_lines_only(place, run):
    (place.folder / "text.txt").write_text("\n \n\n")
    assert "text.txt" in run()


def test_a_missing_file(run):
    assert "none.txt" in run("data.sources=[none.txt]")


def test_a_wrong_encoding(place, run):
    (place.folder / "text.txt").write_bytes("größer\n\n".encode("latin-1") * 50)
    assert "text.txt" in (said := run()) and "data.encoding" in said


def test_an_unknown_encoding(run):
    assert "utf-9" in run("data.encoding=utf-9")


def test_a_row_that_is_not_json(place, run):
    (place.folder / "rows.jsonl").write_text('{"text": "the cat"}\n{"text": "a dog"\n')
    assert "rows.jsonl line 2" in run("data.sources=[rows.jsonl]")


def test_a_missing_column(place, run):
    (place.folder / "rows.jsonl").write_text('{"body": "the cat"}\n')
    assert "rows.jsonl line 1" in (said := run("data.sources=[rows.jsonl]"))
    assert "'text'" in said and "data.columns" in said and "body" in said


def test_cleaning_that_drops_everything(run):
    assert "data.clean" in run("data.clean.min_chars=100000")


def test_a_regular_expression_that_is_none(run):
    assert "data.documents" in run('data.documents="("')


def test_shares_that_leave_nothing_to_train_on(run):
    assert "data.split" in run("data.split.validation=0.5", "data.split.test=0.5")


# --- recipe ---------------------------------------------------------------------------------------------------------


def test_an_unknown_recipe(refused):
    assert "did you mean 'demo'" in refused("run", "dmeo")
    assert "none.yaml: there is no such recipe" in refused("run", "none.yaml")


def test_an_unknown_field_suggests_the_nearest(run):
    assert "train.stpes: unknown field; did you mean 'steps'?" in run("train.stpes=3")


def test_an_unknown_task_preset_and_switch(run):
    assert "causal_lm" in run("task=causal_ml")
    assert "gpt-mini" in run("model.preset=gpt-mimi")
    assert "dropuot" in run("model.switches.dropuot=0.1")


def test_a_recipe_that_is_not_text(place, refused):
    place.recipe.write_bytes(b"\xff\xfe\x00")
    assert "recipe.yaml" in refused("run", place.recipe)


def test_a_vocabulary_larger_than_the_data_allows(run):
    said = run("data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=50000")
    assert "data.tokenizer.vocab_size" in said and "50000" in said.replace(",", "")


def test_a_context_longer_than_the_split(run):
    assert "lower train.context to" in run("train.context=100000")


def test_a_context_longer_than_any_document_is_no_error(place, command):
    result = command("run", place.recipe, "--folder", place.run_folder, "--set", "train.context=512")
    assert result.exit_code == 0


def test_steps_and_epochs_together(run):
    assert "train.steps and train.epochs" in run("train.epochs=1", "train.steps=9")


def test_a_tokenizer_that_is_not_there(run):
    assert "none.json" in run("data.tokenizer.path=none.json")


def test_a_start_with_a_wrong_vocabulary(ran, finished_runs, refused, tmp_path):
    said = refused(
        "run",
        ran.recipe,
        *("--folder", tmp_path / "other"),
        *("--set", f"model.start={ran.model}"),
        *("--set", f"data.tokenizer.path={finished_runs('masked_lm').model}"),
    )
    assert "model.start" in said and "data.tokenizer.path" in said


def test_a_start_brings_its_own_tokenizer(ran, command, tmp_path):
    other = tmp_path / "other"
    result = command(
        "run", ran.recipe, "--folder", other, "--set", f"model.start={ran.model}", "--set", "data.tokenizer.kind=bytes"
    )
    assert result.exit_code == 0 and f"loaded from {ran.model}" in result.output
    assert (other / "model/tokenizer.json").read_bytes() == (ran.model / "tokenizer.json").read_bytes()


def test_a_start_of_another_kind(ran, finished_runs, refused, tmp_path):
    masked = finished_runs("masked_lm").model
    said = refused(
        "run",
        ran.recipe,
        *("--folder", tmp_path / "other"),
        *("--set", f"model.start={masked}", "--set", f"data.tokenizer.path={masked}"),
    )
    assert "model.start" in said and "encoder" in said


def test_a_start_with_a_shorter_context(ran, refused, tmp_path):
    said = refused(
        "run",
        ran.recipe,
        *("--folder", tmp_path / "other"),
        *("--set", f"model.start={ran.model}", "--set", f"data.tokenizer.path={ran.model}"),
        *("--set", "train.context=64"),
    )
    assert "train.context: 64 is longer than the 32" in said


# --- run folder -----------------------------------------------------------------------------------------------------


def test_a_run_folder_that_is_a_file(place, run):
    place.run_folder.write_text("mine")
    assert "is a file" in run() and place.run_folder.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_that_is_not_writable(place, run):
    place.run_folder.mkdir()
    place.run_folder.chmod(0o500)
    assert "cannot be written" in run()


def test_two_runs_in_one_folder(ran, refused):
    with (ran.run_folder / "log.txt").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "another formary process" in refused("run", ran.recipe, "--folder", ran.run_folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"train": 3}', '{"train": {"key": 1}}'])
def test_a_damaged_stages_file_only_costs_time(ran, content):
    (ran.run_folder / "stages.json").write_text(content)
    assert ran.run(until="documents").did == ("documents",)


def test_damaged_token_shards_are_named(ran, refused):
    (ran.run_folder / "data/tokens/train/tokens.bin").write_bytes(b"")
    said = refused("run", ran.recipe, "--folder", ran.run_folder, "--set", "train.steps=3")
    assert "tokens.bin" in said and "prepare the data again" in said


# --- models ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_a_model_folder_is_not_opened(ran, refused, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (ran.model / "model.safetensors").unlink()
    (ran.model / name).write_bytes(pickle.dumps(Bomb()))
    said = refused("generate", ran.model, "the")
    assert not (tmp_path / "exploded").exists() and str(ran.model) in said
    torch.save({"a": torch.zeros(1)}, ran.model / name)
    assert zipfile.is_zipfile(ran.model / name) and refused("generate", ran.model, "the")


def test_a_model_that_is_not_there(refused, tmp_path):
    assert "does not exist" in refused("generate", tmp_path / "none", "the")


def test_a_folder_without_a_model(refused, tmp_path):
    assert "config.json" in refused("generate", tmp_path, "the")


def test_a_prompt_longer_than_the_context_is_not_shown_as_if_it_were_an_answer(finished, command):
    result = command("generate", finished.model, "the cat " * 10)
    assert result.exit_code == 2 and result.stdout == ""
    assert "prompt: 80 tokens are more than the context of 32" in result.stderr


def test_a_text_without_a_mask_for_an_encoder(finished_runs, refused):
    assert "[MASK]" in refused("generate", finished_runs("masked_lm").model, "the cat")


def test_a_setting_out_of_its_range(finished, refused):
    assert "top_p" in refused("generate", finished.model, "the", "--top-p", "3")


def test_an_encoder_measured_on_plain_text(finished_runs, refused):
    place = finished_runs("masked_lm")
    assert "only causal models" in refused("evaluate", place.model, place.folder / "text.txt")


def test_a_model_measured_on_an_empty_file(finished, refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused("evaluate", finished.model, tmp_path / "empty.txt")
