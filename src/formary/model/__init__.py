"""The Transformer: one implementation for decoders, encoders and encoder-decoders.

Read in this order: config, norms, dropout, attention, block, transformer, embedders, heads, topologies, initialise.
This package knows tensors only: no files, no training, no text.
"""
