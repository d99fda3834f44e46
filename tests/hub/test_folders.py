"""Model folders: what is refused and how it is said, and what is written beside the weights."""

from __future__ import annotations

import dataclasses
import errno
import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formary.errors import CheckpointError, StorageError
from formary.hub.checkpoint import load, save
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import build
from formary.recipe.presets import preset


def config_of(name: str = "gpt2-mini") -> ModelConfig:
    return preset(name, vocab_size=31, context=16, size="2x16", switches={"heads": 2})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 of our own making."""
    path = tmp_path / "model"
    path.mkdir()
    save(path, build(config_of(), seed=0))
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    path.mkdir()
    config = preset("gpt-mini", vocab_size=31, context=16, size="2x16", switches={"heads": 4, "qk_norm": False})
    save(path, build(config, seed=0))
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    return path


def change(folder: Path, **fields: Any) -> None:
    """Replace fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    kept = {key: value for key, value in config.items() if value is not None or key not in fields}
    (folder / "config.json").write_text(json.dumps(kept))


def change_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


class Trap:
    """Unpickling this creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_a_folder_with_only_a_pickle_is_refused_with_the_reason_and_the_way_out(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match=r"pickle can run any code.*save_pretrained\(new_folder\)") as error:
        load(folder)
    assert name in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_never_opened(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    load(folder)
    assert not trap.exists()
    pickle.loads((folder / "optimizer.pt").read_bytes())
    assert trap.exists()  # the trap itself works


def test_a_folder_without_config_or_weights_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no model\.safetensors; the folder holds config\.json"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json"):
        load(tmp_path / "empty")


def test_missing_weights_are_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.bias"))
    with pytest.raises(CheckpointError, match=r"weights are missing: transformer\.h\.1\.mlp\.c_fc\.bias"):
        load(folder)


def test_weights_too_many_are_named(folder: Path) -> None:
    change(folder, n_layer=1)
    with pytest.raises(CheckpointError, match=r"gpt2 does not have: transformer\.h\.1\.\S+, .* and 6 more"):
        load(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    change(folder, n_inner=99)
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.c_fc\.weight has shape \(16, 64\), .* \(16, 99\)"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, r"heads 4 do not divide evenly into kv_heads 3"),
        ({"num_key_value_heads": 2}, r"k_proj\.weight has shape \(16, 16\), config\.json asks for \(8, 16\)"),
        ({"num_attention_heads": 3, "head_dim": None}, r"width 16 is not divisible by heads 3"),
        ({"hidden_size": None}, r"config\.json: 'hidden_size' is missing"),
        ({"hidden_size": "wide"}, r"config\.json holds a value of the wrong kind"),
        ({"rope_scaling": [1]}, r"config\.json holds a value of the wrong kind"),
        ({"num_hidden_layers": 10**9}, r"asks for 1000000000 layers, but there are only"),
        ({"hidden_act": "mish"}, r"hidden_act 'mish' is not an activation Formary knows"),
        ({"model_type": "lama"}, r"'lama' is not one Formary reads .* did you mean 'llama'"),
        ({"model_type": "mistral", "sliding_window": 8}, r"sliding_window 8 is shorter than .* 16"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, r"sliding_window 8 is shorter"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, r"type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, r"type 'dynamic' is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types .*chunked_attention"),
    ],
)
def test_a_config_that_does_not_fit_or_would_give_wrong_numbers_is_refused(
    llama: Path, fields: dict[str, Any], message: str
) -> None:
    change(llama, **fields)
    with pytest.raises(CheckpointError, match=message) as error:
        load(llama)
    assert str(llama) in str(error.value)


def test_a_window_as_long_as_the_context_is_no_obstacle(llama: Path) -> None:
    change(llama, model_type="mistral", sliding_window=16)
    assert load(llama).config.context == 16


def test_a_tied_head_that_differs_from_the_embedding_is_reported(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(31, 16)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight should be the same as .* tie_word_embeddings to false"):
        load(folder)
    change(folder, tie_word_embeddings=False)
    assert load(folder).network.head.weight.abs().max() == 0


def test_damaged_files_are_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json does not hold the settings of a model"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("map_of", "message"),
    [
        ({"a": "../model.safetensors"}, r"not safetensors files of the same folder: \.\./model\.safetensors"),
        ({"a": "pytorch_model.bin"}, r"not safetensors files of the same folder: pytorch_model\.bin"),
        ({"a": "model-00001-of-00002.safetensors"}, r"names files that are not there: model-00001-of-00002"),
        ({}, r"not safetensors files of the same folder"),
        ({"a": 3}, r"is not an index of safetensors files"),
    ],
)
def test_an_index_that_leaves_the_folder_or_names_missing_files_is_refused(
    folder: Path, map_of: dict[str, Any], message: str
) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_of}))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_several_safetensors_without_an_index_are_not_guessed_at(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    assert load(folder).family == "gpt2"
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"several safetensors files \(one\.safetensors, two\.safetensors\)"):
        load(folder)


def test_a_modules_file_cannot_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    (folder / "modules.json").write_text(json.dumps([{"path": ".."}, {"path": "../x"}, "no module"]))
    assert load(folder).family == "gpt2"


def test_what_was_saved_comes_back_with_everything_beside_it(tmp_path: Path) -> None:
    config = dataclasses.replace(config_of(), bos_id=3, eos_id=4, pad_id=5)
    network = build(config, seed=0)
    save(tmp_path, network, generation={"temperature": 0.5, "eos_token_id": [4, 6]}, formary={"task": "causal_lm"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    checkpoint = load(tmp_path)
    assert checkpoint.config == config
    assert checkpoint.generation == {"bos_token_id": 3, "eos_token_id": [4, 6], "pad_token_id": 5, "temperature": 0.5}
    assert checkpoint.formary == {"task": "causal_lm"}
    assert checkpoint.chat_template == "{{ messages }}"
    assert not checkpoint.network.training and all(p.requires_grad for p in checkpoint.network.parameters())
    assert checkpoint.network.head.weight is checkpoint.network.embedder.tokens.weight
    torch.testing.assert_close(dict(checkpoint.network.state_dict()), dict(network.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        (None, None),
    ],
)
def test_a_chat_template_is_found_in_the_tokenizers_config(folder: Path, template: Any, expected: str | None) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert load(folder).chat_template == expected


def test_a_loaded_network_does_not_depend_on_the_file_any_more(folder: Path) -> None:
    network = load(folder).network
    before = network.transformer.norm.weight.clone(), network.embedder.tokens.weight.clone()
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(network.transformer.norm.weight, before[0])
    assert torch.equal(network.embedder.tokens.weight, before[1])


@pytest.mark.parametrize("kind", ["rope", "sinusoidal"])
def test_position_tables_are_computed_when_weights_are_loaded(kind: str, tmp_path: Path) -> None:
    stack = TransformerConfig(layers=1, width=16, heads=2, position=kind, context=16)  # type: ignore[arg-type]
    network = build(ModelConfig(topology="decoder", transformer=stack, vocab_size=31), seed=0).eval()
    save(tmp_path, network)
    loaded = load(tmp_path).network
    tokens = torch.arange(12)[None]
    assert all(buffer.device.type == "cpu" for buffer in loaded.buffers())
    assert torch.equal(loaded(tokens), network(tokens))


def test_a_full_disk_leaves_no_half_written_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("formary.hub.checkpoint.save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save(folder, build(config_of(), seed=1))
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".writing-*"))


def test_a_full_disk_met_by_safetensors_itself_is_a_storage_error(tmp_path: Path) -> None:
    """A real limit on file size, in a process of its own: the write fails half way."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from formary.errors import StorageError\n"
        "from formary.hub.checkpoint import save\n"
        "from formary.recipe.presets import preset\n"
        "from formary.model.topologies import build\n"
        "network = build(preset('gpt2-mini', vocab_size=3000, context=16, size='1x64'), seed=0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save(Path(sys.argv[1]), network)\n"
        "except StorageError as error:\n"
        "    print('storage:', error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("storage:") and "model.safetensors" in done.stdout
    assert not list(tmp_path.iterdir())
