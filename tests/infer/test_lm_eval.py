"""The adapter for lm-evaluation-harness: the same figures as the harness's own adapter for transformers."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from formary.errors import MissingExtra

COLOURS = ["red", "green", "blue", "white", "black", "grey"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return gpt2(tmp_path_factory.mktemp("gpt2"), 64)


def gpt2(folder, positions):
    """A random GPT-2 of transformers with a byte-level vocabulary."""
    pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([f"The colour of the sky is {colour}." for colour in COLOURS], trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    words.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=positions, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    network = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory):
    """A folder with three tasks of the harness over a local JSONL file: choices, perplexity, writing."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Thing {n} is",
            "choices": [COLOURS[n % 6], COLOURS[(n * 5 + 2) % 6], COLOURS[(n + 3) % 6]],
            "label": n % 3,
            "text": f"The thing of number {n} is {COLOURS[n % 6]}, and " * (1 + n % 5),
        }
        for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    shared = {**data, "test_split": "test", "metadata": {"version": 1}}
    measured = {"higher_is_better": True, "aggregation": "mean"}
    tasks = {
        "colours": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "fewshot_split": "test",
            "num_fewshot": 2,
            "metric_list": [{"metric": "acc", **measured}, {"metric": "acc_norm", **measured}],
        },
        "sentences": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity", "higher_is_better": False}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[label]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **measured}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}), encoding="utf-8")
    return folder, list(tasks)


def evaluated(model, harness_tasks, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder, names = harness_tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def test_the_harness_finds_the_same_as_with_its_own_adapter(checkpoint, harness_tasks, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    from formary.infer.lm_eval import FormaryLM

    ours = evaluated(FormaryLM(checkpoint), harness_tasks)
    theirs = evaluated(
        "hf", harness_tasks, model_args={"pretrained": str(checkpoint), "dtype": "float32"}, device="cpu", batch_size=4
    )
    scores, expected = (found["results"] for found in (ours, theirs))
    assert scores["colours"]["acc,none"] == expected["colours"]["acc,none"]
    assert scores["colours"]["acc_norm,none"] == expected["colours"]["acc_norm,none"]
    assert 0 < scores["colours"]["acc,none"] < 1
    perplexity = "byte_perplexity,none"
    assert scores["sentences"][perplexity] == pytest.approx(expected["sentences"][perplexity], rel=1e-5)
    for task in ("colours", "writing"):
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            if task == "writing":
                assert mine["resps"] == other["resps"]
                continue
            for mine_one, other_one in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(mine_one[0]) == pytest.approx(float(other_one[0]), abs=1e-4)
                assert mine_one[1] == other_one[1]


@contextmanager
def served(folder, environment):
    """`formary serve` for a folder, as a program of its own; the address of its API."""
    command = [sys.executable, "-m", "formary", "serve", str(folder), "--port", "0", "--precision", "float32"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield next(line.split()[1] for line in running.stdout if line.startswith("API:"))
        finally:
            running.terminate()
            running.stdout.read()
            assert running.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", ["batch_size=1", "batch_size=7,num_concurrent=4"], ids=["one by one", "together"])
def test_through_the_server_the_harness_finds_what_it_finds_in_process(harness_tasks, tmp_path, monkeypatch, options):
    for needed in ("lm_eval", "tenacity"):
        pytest.importorskip(needed, reason="lm-eval[api] is not installed")
    from formary.infer.lm_eval import FormaryLM

    folder = gpt2(tmp_path / "tiny", 512)  # in which every text fits whole: over HTTP windows are cut otherwise
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    ours = evaluated(FormaryLM(folder), harness_tasks)
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = os.environ | offline | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    tasks, names = harness_tasks
    with served(folder, environment) as address:
        batch, _, rest = options.partition(",")
        arguments = f"base_url={address}/completions,model=tiny,tokenizer={folder},tokenizer_backend=huggingface"
        command = [str(Path(sys.executable).with_name("lm-eval")), "run", "--model", "local-completions"]
        command += ["--model_args", f"{arguments},max_length=512,{rest}".rstrip(","), "--tasks", ",".join(names)]
        command += ["--include_path", str(tasks), "--batch_size", batch.partition("=")[2]]
        command += ["--log_samples", "--output_path", str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(found.read_text(encoding="utf-8"))["results"]
    for task, measured in ours["results"].items():
        figures = {name: value for name, value in measured.items() if name.endswith(",none") and "stderr" not in name}
        assert figures and {name: scores[task][name] for name in figures} == pytest.approx(figures, abs=1e-4)
    for task in names:
        (rows,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        theirs = {row["doc_id"]: row["resps"] for row in map(json.loads, rows.open(encoding="utf-8"))}
        assert len(theirs) == 24
        for sample in ours["samples"][task]:
            other = theirs[sample["doc_id"]]
            if task == "writing":
                assert other == sample["resps"]
            elif task == "colours":
                for (mine,), (one,) in zip(sample["resps"], other, strict=True):
                    assert float(one[0]) == pytest.approx(mine[0], abs=1e-4) and str(one[1]) == str(mine[1])
            else:
                assert float(other[0][0]) == pytest.approx(sample["resps"][0][0], abs=1e-4 * 100)


def test_without_the_harness_the_message_is_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "formary.infer.lm_eval", raising=False)
    with pytest.raises(MissingExtra, match=r'pip install "formary\[lm-eval\]"'):
        import formary.infer.lm_eval  # noqa: F401
