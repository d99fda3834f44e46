"""From a reference to a place on disk, without ever reaching for a real network."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from formary.errors import CheckpointError
from formary.hub import resolve as module
from formary.hub.resolve import resolve


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the cache, nothing in the current folder, and any request fails as without a network."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)


def test_folders_and_gguf_files_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"


def test_a_file_of_a_model_folder_stands_for_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(tmp_path / "model.safetensors") == tmp_path
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither a model folder nor a \.gguf file"):
        resolve(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("reference", ["./runs/demo/model", "a/b/c", "/no/such/model", "model.gguf", "~/no-such"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; a model is a folder, a \.gguf file or a hub id"):
        resolve(reference)


@pytest.mark.parametrize("reference", ["gpt2", "owner/some-model.v2"])
def test_without_a_network_the_error_says_where_to_put_the_files(reference: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        resolve(reference)
    assert f"into {tmp_path / reference}" in str(error.value)
    assert "model.safetensors" in str(error.value) and "name resolution failed" in str(error.value)
    (tmp_path / reference).mkdir(parents=True)
    assert resolve(reference).absolute() == tmp_path / reference


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        resolve("gpt2")


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: release.wait())
    assert module._PATIENCE < 5
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    started = time.monotonic()
    try:
        with pytest.raises(CheckpointError, match="did not answer"):
            resolve("gpt2")
        assert time.monotonic() - started < 2
    finally:
        release.set()


def test_what_was_fetched_before_is_used_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")

    def cached(name: str, *, local_files_only: bool = False, **rest: Any) -> str:
        assert name == "owner/name" and local_files_only
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert resolve("owner/name") == snapshot


@pytest.mark.parametrize("files", [["config.json", "pytorch_model.bin"], ["config.json", "model.safetensors"]])
def test_only_safetensors_are_fetched(files: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def info(*args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def download(name: str, *, allow_patterns: list[str], **rest: Any) -> str:
        assert "*.safetensors" in allow_patterns and not any("bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    if "model.safetensors" in files:
        assert resolve("owner/name") == tmp_path
    else:
        with pytest.raises(CheckpointError, match="no safetensors weights on the hub"):
            resolve("owner/name")
