"""The special tokens of a tokenizer: the roles they have, and the names that stand for these where nothing says otherwise."""

from __future__ import annotations

ROLES = ("bos", "eos", "pad", "mask", "cls", "sep", "unk")

SPECIALS: dict[str, dict[str, str]] = {
    "causal_lm": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    "masked_lm": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "denoise": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "chat": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
}
"""What a tokenizer trained here calls its special tokens, by task."""

KNOWN_NAMES: dict[str, tuple[str, ...]] = {
    "bos": ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "pad": ("<pad>", "[PAD]", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "unk": ("[UNK]", "<unk>"),
}
"""What a tokenizer without any configuration beside it calls them, likeliest first."""
