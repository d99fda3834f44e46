"""Training: the loop, its optimisers and schedules, its checkpoints and its records.

Read `loop` first, top to bottom. Tasks give batches and losses; this package knows nothing else of them.
"""
