"""GGUF files: the metadata as a Hugging Face config, the tensors under Hugging Face names, the tokenizer inside.

Everything after that is the families' business, so a GGUF model is one more source of weights for the same tables.
Quantised tensors are expanded to float32 by the `gguf` package; nothing here writes GGUF.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from formary.errors import CheckpointError, MissingExtra
from formary.model.attention import Rotary
from formary.model.config import RopeScaling, TransformerConfig

# GGUF's names for the tensors of a block, and ours to the rest of the hub: Hugging Face's.
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_NAMES = {"llama": _LLAMA_NAMES, "qwen2": _LLAMA_NAMES, "qwen3": _LLAMA_NAMES, "gpt2": _GPT2_NAMES}
# Holds the frequencies that Llama 3's stretching gives; read as the config they come from.
_ROPE_FACTORS = "rope_freqs.weight"

# How text is cut before byte-pair merging, by the name GGUF has for it: patterns applied one after the other.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "starcoder": (r"\p{N}", _GPT2_WORDS),
    "llama-bpe": (_LLAMA3_WORDS,),
    "qwen2": (_LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),),
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of tokens


class GgufFile:
    """A source of weights (see `hub.weights.Source`) with the config, tokenizer and chat template beside them.

    Raises:
        MissingExtra: the `gguf` package is not installed.
        CheckpointError: the file is damaged, or its architecture, rotary scaling or tokenizer is not supported.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingExtra("gguf", "Reading a GGUF file") from error
        self._dequantize = gguf.quants.dequantize
        self.path = path
        try:
            self._reader = _plain_reader(gguf.GGUFReader)(path)
        except Exception as error:  # a foreign parser on a foreign file: whatever it stumbles over, the file is damaged
            raise CheckpointError(f"{path} is not a whole GGUF file ({error}); download it again") from error
        self.architecture = str(self._field("general.architecture", ""))
        if self.architecture not in _NAMES:
            raise CheckpointError(
                f"{path}: architecture '{self.architecture}' is not one Formary reads from GGUF ({', '.join(_NAMES)})"
            )
        self._tensors: dict[str, Any] = {}
        self._factors: Tensor | None = None
        for tensor in self._reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                self._factors = self._expand(tensor)
            else:
                self._tensors[self._their_name(tensor.name)] = tensor
        self.hf = self._gpt2_config() if self.architecture == "gpt2" else self._llama_config()
        self.chat_template: str | None = self._field("tokenizer.chat_template", None)

    @property
    def names(self) -> Iterable[str]:
        """Hugging Face's names of the tensors; those without one keep GGUF's."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor as Hugging Face stores it, in float32."""
        weight = self._expand(self._tensors[name])
        if self.architecture == "gpt2" and weight.ndim == 2 and ".h." in name:
            return weight.T
        if self.architecture == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
            heads = self.hf["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            return _halves(weight, heads)
        return weight

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json would say: the ids of begin, end (of text and of a turn) and padding."""
        ends = [self._id(name) for name in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        ids = {
            "bos_token_id": self._id("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self._id("padding"),
        }
        return {key: value for key, value in ids.items() if value is not None}

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer inside the file; None when there is none.

        Raises:
            CheckpointError: of a kind that Formary does not know.
        """
        kind = self._field("tokenizer.ggml.model", None)
        if kind is None:
            return None
        tokens: list[str] = self._needed("tokenizer.ggml.tokens")
        kinds: list[int] = self._field("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        if kind == "gpt2":
            tokenizer = self._byte_pairs(tokens)
        elif kind == "llama":
            tokenizer = self._pieces(tokens, kinds)
        else:
            raise CheckpointError(f"{self.path}: tokenizer '{kind}' is not one Formary reads from GGUF (gpt2, llama)")
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == _CONTROL]
        )
        tokenizer.add_tokens(
            [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, kinds) if k == _USER_DEFINED]
        )
        self._frame(tokenizer, tokens, begins=kind == "llama")
        return tokenizer

    def _byte_pairs(self, tokens: list[str]) -> Tokenizer:
        cut = self._field("tokenizer.ggml.pre", "default")
        if cut not in _CUTS:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.pre '{cut}' is not a way of cutting text that Formary knows "
                f"({', '.join(_CUTS)})"
            )
        merges = [tuple(merge.split(" ", 1)) for merge in self._needed("tokenizer.ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe"))
        if cut == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _CUTS[cut]),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _pieces(self, tokens: list[str], kinds: list[int]) -> Tokenizer:
        """SentencePiece's byte-pair model: it joins the pair whose result scores best, so merges are read off scores."""
        scores: list[float] = self._needed("tokenizer.ggml.scores")
        vocabulary = {token: number for number, token in enumerate(tokens)}
        found: list[tuple[float, int, int, str, str]] = []
        for token, kind, score in zip(tokens, kinds, scores):
            for cut in range(1, len(token) if kind == _NORMAL else 0):
                left, right = token[:cut], token[cut:]
                if left in vocabulary and right in vocabulary:
                    found.append((-score, vocabulary[left], vocabulary[right], left, right))
        merges = [(left, right) for *_, left, right in sorted(found)]
        unknown = next((token for token, kind in zip(tokens, kinds) if kind == _UNKNOWN), None)
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        prefix = bool(self._field("tokenizer.ggml.add_space_prefix", True))
        space = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
        decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefix else decoding)
        return tokenizer

    def _frame(self, tokenizer: Tokenizer, tokens: list[str], *, begins: bool) -> None:
        """Put the begin and end tokens around what is encoded, as the file asks for."""
        begins = begins or self._field("tokenizer.ggml.pre", "") == "llama-bpe"
        bos = self._id("bos") if self._field("tokenizer.ggml.add_bos_token", begins) else None
        eos = self._id("eos") if self._field("tokenizer.ggml.add_eos_token", False) else None
        if bos is None and eos is None:
            return
        before = [f"{tokens[bos]}"] if bos is not None else []
        after = [f"{tokens[eos]}"] if eos is not None else []
        used = [(tokens[number], number) for number in {bos, eos} if number is not None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B:1"], special_tokens=used
        )

    def _llama_config(self) -> dict[str, Any]:
        heads = self._size("attention.head_count")
        width = self._size("embedding_length")
        head_width = self._size("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._size(key, head_width) != head_width:
                raise CheckpointError(f"{self.path}: {key} differs from the width of a head ({head_width})")
        context = self._size("context_length")
        if self._size("attention.sliding_window", context) < context:
            raise CheckpointError(f"{self.path}: attention within a sliding window is not supported")
        scaling = self._field(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise CheckpointError(f"{self.path}: rope.scaling.type '{scaling}' is not supported")
        theta = float(self._field(f"{self.architecture}.rope.freq_base", 10000.0))
        return {
            "model_type": self.architecture,
            "vocab_size": self._rows("model.embed_tokens.weight"),
            "hidden_size": width,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": head_width,
            "rms_norm_eps": _rounded(self._needed(f"{self.architecture}.attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": context,
            "rope_theta": theta,
            "rope_scaling": self._stretch(theta, head_width),
            "attention_bias": self.architecture == "llama" and any("q_proj.bias" in name for name in self._tensors),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **self._ids(),
        }

    def _gpt2_config(self) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "vocab_size": self._rows("transformer.wte.weight"),
            "n_embd": self._size("embedding_length"),
            "n_inner": self._size("feed_forward_length"),
            "n_layer": self._size("block_count"),
            "n_head": self._size("attention.head_count"),
            "n_positions": self._size("context_length"),
            "layer_norm_epsilon": _rounded(self._needed("gpt2.attention.layer_norm_epsilon")),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **self._ids(),
        }

    def _stretch(self, theta: float, head_width: int) -> dict[str, Any] | None:
        """Llama 3's rope_scaling from the factors it leads to; they do not say it, so it is guessed and checked."""
        if self._factors is None:
            return None
        factor = round(float(self._factors.max()), 3)
        stretch = RopeScaling(factor, 1.0, 4.0, 8192)
        sizes: dict[str, Any] = {"layers": 1, "width": head_width, "heads": 1, "position": "rope", "context": 2}

        def frequencies(scaling: RopeScaling | None) -> Tensor:
            rotary = Rotary(TransformerConfig(**sizes, rope_theta=theta, rope_scaling=scaling))
            return torch.atan2(rotary.sines[1].double(), rotary.cosines[1].double())

        if not torch.allclose(frequencies(None) / frequencies(stretch), self._factors.double(), rtol=1e-2):
            raise CheckpointError(f"{self.path}: {_ROPE_FACTORS} does not hold the stretching of Llama 3")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }

    def _their_name(self, name: str) -> str:
        """token_embd.weight -> model.embed_tokens.weight"""
        module, _, ending = name.rpartition(".")
        number = re.search(r"^blk\.(\d+)\.", module)
        pattern = module.replace(number[0], "blk.{i}.", 1) if number else module
        theirs = _NAMES[self.architecture].get(pattern)
        return name if theirs is None else f"{theirs.replace('{i}', number[1] if number else '')}.{ending}"

    def _expand(self, tensor: Any) -> Tensor:
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be expanded here"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape([int(n) for n in reversed(tensor.shape)])

    def _rows(self, name: str) -> int:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: the tensor of token vectors (token_embd.weight) is missing")
        return int(self._tensors[name].shape[-1])

    def _ids(self) -> dict[str, int | None]:
        return {
            f"{theirs}_token_id": self._id(name) for theirs, name in (("bos",) * 2, ("eos",) * 2, ("pad", "padding"))
        }

    def _id(self, name: str) -> int | None:
        value = self._field(f"tokenizer.ggml.{name}_token_id", None)
        return None if value is None else int(value)

    def _size(self, key: str, default: int | None = None) -> int:
        key = f"{self.architecture}.{key}"
        value = self._needed(key) if default is None else self._field(key, default)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) != 1:
            raise CheckpointError(f"{self.path}: {key} differs between layers ({value}), which is not supported")
        return int(values.pop())

    def _field(self, key: str, default: Any) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _needed(self, key: str) -> Any:
        value = self._field(key, None)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lack {key}")
        return value


def _plain_reader(reader: type[Any]) -> type[Any]:
    """The library's reader over a plain array: each of the many slices of a memory map costs several times as much."""

    class PlainReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap[Any, Any]) -> None:
            self._plain: np.ndarray[Any, Any] = np.asarray(mapped)

    return PlainReader


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Query or key rows from llama.cpp's order, in which the two of a rotary pair are neighbours, to halves of a head.

    Both orders give fluent text; only one of them the right text.
    """
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _rounded(value: float) -> float:
    """A float32 as the decimal that was meant: 9.999999747378752e-06 -> 1e-05."""
    digits = 6 - math.floor(math.log10(abs(value))) if value else 0
    return round(float(value), digits)
