"""From raw files to batches of tokens: source, clean, split, augment, documents, tokenizer, shards, batches.

Everything streams: a file larger than memory passes through in pieces. Nothing here knows models or training.
"""
