"""The command: from a folder to an answer over HTTP and an orderly end, and what is told when it cannot begin."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from typer.testing import CliRunner

from formary.cli.main import app
from formary.data import tokenizer as tokenizers
from formary.errors import FormaryError
from formary.hub import checkpoint
from formary.infer.loaded import load
from formary.model.topologies import build
from formary.recipe import schema
from formary.recipe.presets import preset
from formary.serve.service import ServerSettings, Service, base_of, load_all, names_of, with_adapter
from formary.train import lora

TUNE = schema.Tune(method="lora", rank=2, alpha=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder as a folder, its adapter beside it."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    made.mkdir()
    words = tokenizers.train(
        ["the cat sat on the mat " * 9], schema.Tokenizer(kind="bytes", vocab_size=300), task="causal_lm"
    )
    config = preset("gpt-mini", vocab_size=words.vocab_size, context=4096, size="2x32")
    network = build(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    checkpoint.save(made, network)
    words.save(made)
    lora.insert(network, TUNE, seed=0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, lora.LoraLinear):
                for b in module.lora_b:
                    b += 0.5 * torch.randn(b.shape, generator=generator)
    network.requires_grad_(False)  # what would train is stored whole
    lora.save_adapter(made.parent / "adapter", network, TUNE, base=str(made))
    return made


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "formary", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    found = re.search(r"API: +(http://\S+)/v1", said)
    assert found, said + (process.stderr.read() if process.stderr else "")
    return found[1]


def test_it_serves_a_folder_and_its_adapter_and_finishes_what_runs_on_sigterm(folder: Path) -> None:
    adapter = f"tuned={folder.parent / 'adapter'}"
    with command(str(folder), "--port", "0", "--lora", adapter, FORMARY_API_KEY="secret") as process:
        url = url_of(process)
        assert httpx.get(url + "/v1/models").status_code == 401
        head = {"Authorization": "Bearer secret"}
        listed = httpx.get(url + "/v1/models", headers=head).json()["data"]
        assert {entry["id"]: entry["parent"] for entry in listed} == {"tiny": None, "tuned": "tiny"}
        texts: dict[str, str] = {}
        begun = threading.Semaphore(0)

        def ask(model: str) -> None:
            body = {"model": model, "prompt": "the", "max_tokens": 300, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", url + "/v1/completions", json=body, headers=head, timeout=60) as answer:
                received = answer.iter_lines()
                lines = [next(received)]
                begun.release()
                lines += [line for line in received if line.startswith("data: {")]
            pieces = [json.loads(line[6:])["choices"][0] for line in lines]
            texts[model] = "".join(piece["text"] for piece in pieces)
            assert pieces[-1]["finish_reason"] == "length"

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("tiny", "tuned")]
        for thread in threads:
            thread.start()
        assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(60) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    assert len(texts["tiny"]) > 100 and len(texts["tuned"]) > 100 and texts["tiny"] != texts["tuned"]


@pytest.mark.parametrize("case", ["taken", "missing", "precision", "runs", "lora"])
def test_what_cannot_begin_is_told_in_a_line_with_exit_code_2(folder: Path, case: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments, said = {
            "taken": ([str(folder), "--port", port], f"port {port} is taken"),
            "missing": ([str(folder.parent / "nowhere"), "--port", "0"], "nowhere"),
            "precision": ([str(folder), "--precision", "int3"], "--precision int3"),
            "runs": ([str(folder), "--runs", str(folder / "nowhere")], "no such folder"),
            "lora": ([str(folder), "--port", "0", "--lora", f"a={folder}"], "adapter_model.safetensors"),
        }[case]
        found = CliRunner().invoke(app, ["serve", *arguments])
    assert found.exit_code == 2 and said in found.stderr and found.stderr.startswith("error: ")


def test_open_to_others_without_a_key_is_warned_of_and_ctrl_c_ends_it_with_0(folder: Path) -> None:
    with command(str(folder), "--port", "0", "--host", "0.0.0.0") as process:
        url_of(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "warning: 0.0.0.0" in errors and "--api-key" in errors and process.returncode == 0


def test_names_are_the_last_part_of_a_path_unless_given(folder: Path) -> None:
    assert names_of([str(folder), f"mine={folder}"]) == {"tiny": str(folder), "mine": str(folder)}
    assert names_of(["someone/model-of-the-hub"]) == {"someone/model-of-the-hub": "someone/model-of-the-hub"}
    with pytest.raises(FormaryError, match="already"):
        names_of([str(folder), str(folder)])
    with pytest.raises(FormaryError, match="NAME=MODEL"):
        names_of(["=x"])


def test_an_adapter_shares_what_it_leaves_alone_and_writes_as_the_merged_model(folder: Path) -> None:
    base = load(folder)
    before = base.generate("the cat", max_tokens=20).text
    tuned = with_adapter(base, folder.parent / "adapter")
    assert base_of(folder.parent / "adapter") == str(folder)
    merged = load(folder)
    lora.load_adapter(folder.parent / "adapter", merged.network)
    lora.merge(merged.network)
    assert tuned.generate("the cat", max_tokens=20).text == merged.generate("the cat", max_tokens=20).text != before
    assert base.generate("the cat", max_tokens=20).text == before
    theirs = {id(parameter) for parameter in base.network.parameters()}
    shared = [name for name, parameter in tuned.network.named_parameters() if id(parameter) in theirs]
    own = [name for name, parameter in tuned.network.named_parameters() if id(parameter) not in theirs]
    assert any("embed" in name for name in shared) and own and all(name.endswith("weight") for name in own)


def test_among_several_models_an_adapter_finds_its_own(folder: Path, tmp_path: Path) -> None:
    service = Service(ServerSettings())
    said: list[Any] = []
    adapters = {"tuned": str(folder.parent / "adapter")}
    load_all(service, {"a": str(folder), "b": str(folder)}, adapters, say=said.append)
    assert service.served["tuned"].base == "a" and service.state == "ready" and len(said) == 2
    service.stop()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(FormaryError, match="belongs to 'elsewhere'"):
        load_all(Service(ServerSettings()), {"a": str(folder), "b": str(folder)}, {"x": str(stranger)})
