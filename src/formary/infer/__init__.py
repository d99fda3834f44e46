"""Inference: what a trained network writes, scores and fills in.

Read in this order: sampling, stopping, cache, stepper, engine, beam, chat, loaded.
This package does not train, and it speaks neither HTTP nor the command line: `serve` and `cli` sit on top of it.
"""
