"""How good a model is, said honestly: metrics, their 95 % intervals, and naive baselines on the same split.

Every number comes with an interval and beside a baseline; "better" is said only when the interval says so.
Nothing here trains a network, writes a report or knows of run folders.
"""
