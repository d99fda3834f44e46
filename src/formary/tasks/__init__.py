"""Tasks: from hidden states to a loss while learning, and to an answer while serving.

One file per task, all the same shape (`protocol`); `registry` finds them by name.
"""
