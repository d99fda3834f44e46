"""Every family against transformers, both ways: theirs read by us, ours opened by them, the same numbers.

Tiny random checkpoints with odd sizes; all weights are random, since biases at 0 and norms at 1 hide mistakes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from formary.hub.checkpoint import load, save
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import Decoder, Encoder, EncoderDecoder, Network, build
from formary.recipe.presets import PRESETS, preset

WORDED = [name for name, fields in PRESETS.items() if fields.get("embedder", "tokens") == "tokens"]

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 53
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 19,
}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": 24,
    "hidden_dim": 28,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 19,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "decoder_ffn_dim": 30,
    "max_position_embeddings": 19,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 28,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
}
T5_BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 11}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 15,
    "patch_size": 5,
}

# name: (class of transformers, its config class, fields)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 17, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 28},
    ),
    "gpt2-untied-unscaled": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_positions": 17,
            "n_embd": 24,
            "n_layer": 1,
            "n_head": 2,
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "activation_function": "relu",
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied-biased-wide-heads": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "head_dim": 10, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-attention-bias-only": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True}),
    "llama3-stretched": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 6}),
    "bert": ("BertForMaskedLM", "BertConfig", {**BERT, "hidden_act": "gelu_new"}),
    "bert-pretraining": ("BertForPreTraining", "BertConfig", BERT),
    "bert-backbone": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**BERT, "type_vocab_size": 1}),
    "roberta-backbone": ("RobertaModel", "RobertaConfig", BERT),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
    "distilbert-untied": ("DistilBertForMaskedLM", "DistilBertConfig", {**DISTIL, "tie_word_embeddings": False}),
    "distilbert-sinusoidal": ("DistilBertModel", "DistilBertConfig", {**DISTIL, "sinusoidal_pos_embds": True}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "bart-scaled-backbone": ("BartModel", "BartConfig", {**BART, "scale_embedding": True}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, **T5_BUCKETS}),
    "t5-v1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "vit": ("ViTModel", "ViTConfig", VIT),
    "vit-no-query-bias": ("ViTModel", "ViTConfig", {**VIT, "qkv_bias": False, "hidden_act": "relu"}),
}


def shake(module: nn.Module, seed: int = 0) -> None:
    """Random values in every weight and bias, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            center = 1.0 if parameter.ndim == 1 and "weight" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name == "final_logits_bias":
                buffer.copy_(torch.randn(buffer.shape, generator=generator))


def theirs(case: str) -> nn.Module:
    model_class, config_class, fields = CASES[case]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    shake(model)
    if case == "t5-v1.1":  # transformers 5 ties a new T5 in any case; the published ones of version 1.1 are not tied
        model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 24))
    return model.eval()


def tokens(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids (3, length) and a mask in which the rows have length, length - 2 and 1 real tokens; padding has id 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, length), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([length, length - 2, 1])[:, None]
    return ids, mask


@torch.no_grad()
def assert_same(network: Network, model: nn.Module) -> None:
    """The outputs of both, at real positions, differ by less than 1e-4 and are not trivially small."""
    kind, pad = type(model).__name__, getattr(model.config, "pad_token_id", None) or 0
    if isinstance(network, Decoder):
        ids, _ = tokens(13, 1)
        pairs = [(network.head(network(ids)), model(ids).logits)]
    elif isinstance(network, EncoderDecoder):
        ids, mask = tokens(13, 1)
        target, _ = tokens(9, 2)
        ids = ids.masked_fill(~mask, pad)
        out = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target)
        hidden = network(ids, target, source_mask=mask)
        pairs = [(hidden, out.last_hidden_state) if kind == "BartModel" else (network.head(hidden), out.logits)]
    elif kind == "ViTModel":
        pixels = torch.randn(3, 3, network.config.image_size, network.config.image_size)
        out, hidden = model(pixels), network(pixels)
        pairs = [(hidden, out.last_hidden_state)]
        if network.pooler is not None:
            pairs.append((network.pooler(hidden[:, 0]), out.pooler_output))
    else:
        ids, mask = tokens(13, 1)
        ids = ids.masked_fill(~mask, pad)
        types = (torch.arange(13) > 6).long().expand(3, -1)
        more = {"token_type_ids": types} if network.config.token_types > 1 else {}
        out = model(ids, attention_mask=mask.long(), **more)
        hidden = network(ids, mask=mask, types=types if more else None)
        if kind.endswith("Model"):
            pairs = [(hidden[mask], out.last_hidden_state[mask])]
        else:
            logits = out.prediction_logits if kind == "BertForPreTraining" else out.logits
            pairs = [(network.head(hidden)[mask], logits[mask])]
        if network.pooler is not None and kind.endswith("Model"):
            pairs.append((network.pooler(hidden[:, 0]), out.pooler_output))
        if network.next_sentence is not None:
            # ours: 1 means that B follows A; theirs: 0
            pairs.append((network.next_sentence(network.pooler(hidden[:, 0])).flip(-1), out.seq_relationship_logits))
    for ours, oracle in pairs:
        assert oracle.std() > 0.05
        torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=1e-4)


def open_in_transformers(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_transformers_gives_the_same_numbers(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.left_out == ()
    assert_same(checkpoint.network, model)


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_ours_with_nothing_missing_or_unexpected(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    config = load(tmp_path / "theirs").config
    network = build(config, seed=3).eval()
    shake(network, seed=4)
    (tmp_path / "ours").mkdir()
    save(tmp_path / "ours", network)
    opened, info = open_in_transformers(tmp_path / "ours")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert_same(network, opened)
    again = load(tmp_path / "ours")
    assert dataclasses.replace(again.config, initialisation=config.initialisation) == config
    for name, weight in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], weight), name


@pytest.mark.parametrize("name", WORDED)
def test_every_preset_opens_in_transformers(name: str, tmp_path: Path) -> None:
    size = None if name.endswith("mini") else "2x64"
    config = preset(name, vocab_size=VOCAB, context=32, size=size, switches={"layers": 1})
    if name.startswith("bert"):  # without next-sentence prediction masked_lm leaves the pooler out
        config = dataclasses.replace(config, pooler=False)
    config = dataclasses.replace(config, bos_id=2, eos_id=2, pad_id=1, decoder_start_id=2)
    network = build(config, seed=0).eval()
    save(tmp_path, network)
    model, info = open_in_transformers(tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert type(model).__name__ != "PreTrainedModel"
    assert model.config.eos_token_id == 2 and model.config.pad_token_id == 1
    with torch.no_grad():
        ids, mask = tokens(13, 1)
        if isinstance(network, EncoderDecoder):
            out = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=ids).logits
            ours = network.head(network(ids, ids, source_mask=mask))
        elif isinstance(network, Encoder):
            out, ours = model(ids).logits, network.head(network(ids))
        else:
            out, ours = model(ids).logits, network.head(network(ids))
    torch.testing.assert_close(ours, out, atol=1e-4, rtol=1e-4)


def test_bert_with_next_sentence_prediction_opens_as_bert_for_pretraining(tmp_path: Path) -> None:
    switches = {"next_sentence": True, "pooler": True}
    network = build(preset("bert-mini", vocab_size=VOCAB, context=19, size="1x24", switches=switches), seed=0).eval()
    shake(network)
    save(tmp_path, network)
    model, info = open_in_transformers(tmp_path)
    assert type(model).__name__ == "BertForPreTraining" and not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(network, model)


@pytest.mark.parametrize("folder_of", ["whole", "sentence_transformers"])
@pytest.mark.parametrize("case", ["gpt2", "bert", "bart"])
def test_names_are_found_with_and_without_the_backbones_prefix(case: str, folder_of: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = theirs(case)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    if folder_of == "sentence_transformers":
        inner = tmp_path / "0_Transformer"
        inner.mkdir()
        (tmp_path / "config.json").rename(inner / "config.json")
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "path": "0_Transformer"}]))
    else:
        inner = tmp_path
    save_file({name.removeprefix(prefix): weight for name, weight in weights.items()}, inner / "model.safetensors")
    checkpoint = load(tmp_path)
    assert checkpoint.folder == inner  # where the tokenizer is too
    assert_same(checkpoint.network, model)


def test_old_bert_names_gamma_and_beta_and_stored_buffers_are_understood(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = theirs("bert")
    model.save_pretrained(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in load_file(tmp_path / "model.safetensors").items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(19)[None]
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    save_file(old, tmp_path / "model.safetensors")
    assert_same(load(tmp_path).network, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs("llama").to(dtype).save_pretrained(tmp_path)
    network = load(tmp_path).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert_same(network, transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    model = theirs("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    assert_same(load(tmp_path).network, model)


def test_of_a_head_that_we_do_not_build_the_backbone_is_read_and_the_rest_named(tmp_path: Path) -> None:
    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VIT)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    names = ("cls_classifier.bias", "cls_classifier.weight", "distillation_classifier.bias")
    assert checkpoint.left_out == (*names, "distillation_classifier.weight")
    pixels = torch.randn(2, 3, 15, 15)
    with torch.no_grad():
        ours, oracle = checkpoint.network(pixels), model.deit(pixels).last_hidden_state
    torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=1e-4)


def test_greedy_generation_of_transformers_follows_the_ids_that_we_wrote(tmp_path: Path) -> None:
    config = dataclasses.replace(
        preset("bart-base", vocab_size=VOCAB, context=24, size="1x32"), eos_id=2, pad_id=1, bos_id=0, decoder_start_id=7
    )
    network = build(config, seed=1).eval()
    shake(network)
    save(tmp_path, network, generation={"max_new_tokens": 3})
    model, _ = open_in_transformers(tmp_path)
    written = model.generate(torch.tensor([[5, 6, 8]]), num_beams=1, do_sample=False)
    assert written[0, 0] == 7 and written.shape[1] <= 4
    with torch.no_grad():
        first = network.head(network(torch.tensor([[5, 6, 8]]), torch.tensor([[7]])))[0, -1].argmax()
    assert written[0, 1] == first


Change = Callable[[ModelConfig], ModelConfig]


def _stack(**changes: Any) -> Change:
    return lambda config: dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **changes))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt-mini", _stack(norm="layer")),
        ("gpt-mini", _stack(attention_scale=0.5)),
        ("gpt2-mini", _stack(position="sinusoidal")),
        ("gpt2-mini", _stack(position="none")),
        ("gpt2-mini", _stack(bias=False, qkv_bias=False)),
        ("bert-mini", lambda config: dataclasses.replace(config, head="linear")),
        ("bert-mini", _stack(norm_position="pre", final_norm=True)),
        ("bart-base", lambda config: dataclasses.replace(config, tied_embeddings=False)),
    ],
)
def test_what_no_family_can_hold_is_kept_whole_in_our_own_layout(name: str, change: Change, tmp_path: Path) -> None:
    config = change(preset(name, vocab_size=VOCAB, context=20, size="2x32"))
    network = build(config, seed=0).eval()
    save(tmp_path, network)
    checkpoint = load(tmp_path)
    assert checkpoint.family == "formary" and checkpoint.config == config
    ids, _ = tokens(11, 1)
    arguments = (ids, ids) if config.topology == "encoder_decoder" else (ids,)
    with torch.no_grad():
        assert torch.equal(checkpoint.network(*arguments), network(*arguments))


def test_a_stack_whose_sides_differ_where_t5_has_one_size_is_not_written_as_t5(tmp_path: Path) -> None:
    config = preset("seq2seq-mini", vocab_size=VOCAB, context=20, size="1x32")
    assert config.encoder is not None
    wider = dataclasses.asdict(config.encoder) | {"ffn_width": 99}
    network = build(dataclasses.replace(config, encoder=TransformerConfig(**wider)), seed=0)
    save(tmp_path, network)
    assert load(tmp_path).family == "formary"
