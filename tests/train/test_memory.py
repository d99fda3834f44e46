"""Out of memory: the batch's shape is named, and numbers that fit."""

import subprocess
import sys
import textwrap

import pytest
import torch

from formary.recipe.schema import Train
from formary.train.memory import explained, is_memory


def allocating(room):
    def attempt(sequences):
        if sequences > room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    return attempt


def test_what_fits_is_found_and_named():
    batch = {"tokens": torch.zeros(64, 128)}
    said = str(explained(7, batch, Train(batch=64), allocating(20)))
    assert "step 7" in said and "64 sequences of 128 tokens" in said and "--set train.micro_batch=16" in said


def test_where_nothing_fits_a_shorter_context_is_named():
    said = str(explained(7, {"tokens": torch.zeros(4, 128)}, Train(batch=4, context=128), allocating(0)))
    assert "not even one" in said and "train.context (now 128) to 64" in said


def test_other_errors_are_not_taken_for_it():
    assert not is_memory(RuntimeError("shapes do not match")) and is_memory(MemoryError())
    with pytest.raises(RuntimeError, match="shapes"):
        explained(1, {"tokens": torch.zeros(4, 8)}, Train(), lambda _: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_a_process_that_may_take_no_more_memory_says_what_fits(place, tmp_path):
    program = f"""
        import resource, sys, pathlib
        from formary.errors import FormaryError
        from formary.pipeline.run import run
        from formary.train import loop
        gradient = loop.gradient
        def limited(*arguments):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, resource.RLIM_INFINITY))
            return gradient(*arguments)
        loop.gradient = limited
        try:
            run({str(place.recipe)!r}, overrides=["train.batch=4096", "train.steps=2"], folder=pathlib.Path({str(tmp_path / "run")!r}), until="train")
        except FormaryError as error:
            print("SAID", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert "SAID step 0: memory ran out on 4096 sequences of 32 tokens" in done.stdout, done.stdout + done.stderr
    assert "--set train.micro_batch=" in done.stdout
