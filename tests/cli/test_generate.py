"""formary generate: what it prints is what the model in Python says."""

import json

import pytest

import formary


@pytest.fixture(scope="module")
def model(finished):
    return formary.load(finished.model)


def test_it_writes_on_from_the_prompt_as_the_model_does(finished, model, command):
    result = command("generate", finished.model, "the cat", "--max-tokens", 8, "--seed", 3)
    assert result.exit_code == 0
    assert result.stdout == "the cat" + model.generate("the cat", max_tokens=8, seed=3).text + "\n"


def test_greedy_is_the_same_every_time_and_the_default_is_the_recipes(finished, model, command):
    greedy = [
        command("generate", finished.model, "the", "--temperature", 0, "--max-tokens", 8).stdout for _ in range(2)
    ]
    assert greedy[0] == greedy[1] == "the" + model.generate("the", temperature=0, max_tokens=8).text + "\n"
    assert len(model.generate("the", seed=0).tokens) <= 12


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_may_come_from_standard_input(finished, command, arguments):
    given = command("generate", finished.model, "a dog", "--seed", 1)
    assert command("generate", finished.model, *arguments, "--seed", 1, input="a dog").stdout == given.stdout


def test_several_texts_are_numbered(finished, command):
    shown = command("generate", finished.model, "a", "--n", 2)
    assert shown.stdout.startswith("--- 1\na") and "\n--- 2\na" in shown.stdout


def test_json_is_the_generation(finished, model, command):
    (made,) = json.loads(command("generate", finished.model, "the", "--json", "--seed", 5, "--logprobs").stdout)
    expected = model.generate("the", seed=5, logprobs=5)
    assert made["text"] == expected.text and made["tokens"] == list(expected.tokens)
    assert made["finish_reason"] == expected.finish_reason and made["logprobs"] == pytest.approx(expected.logprobs)


def test_log_probabilities_are_one_token_a_line(finished, model, command):
    shown = command("generate", finished.model, "the", "--temperature", 0, "--max-tokens", 4, "--logprobs").stdout
    expected = model.generate("the", temperature=0, max_tokens=4, logprobs=0)
    lines = shown.splitlines()[-len(expected.tokens) :]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(expected.logprobs, abs=1e-4)


def test_it_stops_before_a_stop_text(finished, model, command):
    whole = model.generate("the", temperature=0, max_tokens=12).text
    stop = whole[3:5]
    shown = command("generate", finished.model, "the", "--temperature", 0, "--max-tokens", 12, "--stop", stop).stdout
    assert shown == "the" + whole[: whole.index(stop)] + "\n"


def test_beams_are_beam_search(finished, model, command):
    shown = command("generate", finished.model, "the", "--beams", 3, "--max-tokens", 6).stdout
    assert shown == "the" + model.generate("the", beams=3, max_tokens=6).text + "\n"


def test_a_masked_model_fills_in(finished_runs, command):
    folder = finished_runs("masked_lm").model
    expected = formary.load(folder).fill("the c[MASK]t")[0]
    lines = command("generate", folder, "the c[MASK]t").stdout.splitlines()
    assert [float(line.split("%")[0]) for line in lines] == pytest.approx(
        [100 * candidate.probability for candidate in expected], abs=0.06
    )
    assert [line.split("%  ")[1] for line in lines] == [
        candidate.text if candidate.text.strip() else repr(candidate.text) for candidate in expected
    ]
    made = json.loads(command("generate", folder, "the c[MASK]t", "--json").stdout)
    assert made[0][0]["probability"] == pytest.approx(expected[0].probability)


def test_an_encoder_decoder_answers_without_its_source(finished_runs, command):
    folder = finished_runs("denoise").model
    text = "the cat<extra_id_0> a mat"
    expected = formary.load(folder).generate(text, temperature=0, max_tokens=6).text
    assert command("generate", folder, text, "--temperature", 0, "--max-tokens", 6).stdout == expected + "\n"


def test_the_answer_follows_a_regular_expression_a_choice_or_a_schema(finished, command, tmp_path):
    shown = command("generate", finished.model, "the ", "--regex", "(cat|dog) sat", "--max-tokens", 20)
    assert shown.stdout in ("the cat sat\n", "the dog sat\n")
    shown = command("generate", finished.model, "the ", "--choice", "birds", "--choice", "mat", "--max-tokens", 20)
    assert shown.stdout in ("the birds\n", "the mat\n")
    (tmp_path / "schema.json").write_text('{"enum": [true, null]}', encoding="utf-8")
    shown = command("generate", finished.model, "the ", "--json-schema", tmp_path / "schema.json", "--max-tokens", 20)
    assert shown.stdout in ("the true\n", "the null\n")


def test_a_schema_that_cannot_be_read_or_followed_is_one_line(finished, command, tmp_path):
    missing = command("generate", finished.model, "the", "--json-schema", tmp_path / "no.json")
    assert missing.exit_code == 2 and "no.json" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "schema.json").write_text('{"not": {}}', encoding="utf-8")
    refused = command("generate", finished.model, "the", "--json-schema", tmp_path / "schema.json")
    assert refused.exit_code == 2 and "'not'" in refused.stderr and refused.stdout == ""


def test_in_eight_bits_it_writes_what_the_rounded_model_does(finished, command):
    rounded = formary.load(finished.model, precision="int8")
    shown = command("generate", finished.model, "the", "--temperature", 0, "--max-tokens", 8, "--precision", "int8")
    assert shown.stdout == "the" + rounded.generate("the", temperature=0, max_tokens=8).text + "\n"


def test_an_unknown_precision_is_refused(finished, command):
    shown = command("generate", finished.model, "the", "--precision", "int3")
    assert shown.exit_code == 2 and "'int3' is not known; choose one of auto, float32, int8" in shown.output
