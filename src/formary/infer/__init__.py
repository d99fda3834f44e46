"""Inference: what a trained network writes, scores and fills in.

Read in this order: sampling, stopping, cache, stepper, request, writing, engine, loaded; then what makes it fast: kernels,
fused, probe, prefix, speculate; and what stands beside: beam, constrain, answers, bench, lm_eval.
This package does not train, and it speaks neither HTTP nor the command line: `serve` and `cli` sit on top of it.
"""
