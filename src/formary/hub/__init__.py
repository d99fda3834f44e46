"""Checkpoints in and out: Hugging Face folders of the known families, GGUF files, hub ids.

Read in this order: families/family, one family, checkpoint, resolve, gguf.
Weights are only ever read from safetensors and GGUF; a pickle is never opened.
"""
