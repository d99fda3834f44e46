"""A little language, a recipe for it that runs in a second, and finished runs of it to look at or to copy."""

import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, settings
from rich.console import Console

# Where other work shares the machine an example may take any time; what is tested is never how fast it was drawn.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

_SENTENCE = "the cat sat on a mat while one dog ran after two birds and they flew away over his old house"
_WORDS = _SENTENCE.split()
_PRESETS = {"causal_lm": "gpt-mini", "masked_lm": "bert-mini", "denoise": "seq2seq-mini"}
_PROMPTS = {"causal_lm": ["the cat"], "masked_lm": ["the c[MASK]t sat"], "denoise": ["the cat<extra_id_0> a mat"]}


@pytest.fixture(scope="session")
def words():
    """The words of the little language."""
    return list(_WORDS)


class Place:
    """A folder with text.txt and recipe.yaml; `run` runs it there."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.recipe = self.folder / "recipe.yaml"
        self.run_folder = self.folder / "run"

    def write(self, task="causal_lm"):
        rng = random.Random(0)
        paragraphs = [" ".join(rng.choices(_WORDS, k=rng.randint(8, 25))) + "." for _ in range(90)]
        (self.folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
        recipe = {
            "name": "tiny",
            "description": "a tiny run",
            "task": task,
            "data": {
                "sources": ["text.txt"],
                "documents": "paragraph",
                "tokenizer": {"kind": "characters"},
                "split": {"validation": 0.1, "test": 0.2},
            },
            "model": {"preset": _PRESETS[task], "size": "1x32"},
            "train": {"steps": 6, "batch": 4, "context": 32, "validate_every": 3, "save_every": 2},
            "evaluate": {"bootstrap": 100},
            "generate": {"prompts": _PROMPTS[task], "max_tokens": 12},
            "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
        }
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return self

    def run(self, *overrides, console=None, **options):
        from formary.pipeline.run import run

        console = console or Console(quiet=True)
        return run(self.recipe, overrides=overrides, folder=self.run_folder, console=console, **options)

    def copy(self, folder):
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Place(folder)

    @property
    def model(self):
        return self.run_folder / "model"

    def weights(self):
        return (self.model / "model.safetensors").read_bytes()


@pytest.fixture
def place(tmp_path):
    """The text and the recipe, not run yet."""
    return Place(tmp_path).write()


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """A function from a task to the place of its finished run; run once, so only look at it."""
    places = {}

    def finished(task="causal_lm"):
        if task not in places:
            places[task] = Place(tmp_path_factory.mktemp(task)).write(task)
            places[task].run()
        return places[task]

    return finished


@pytest.fixture(scope="session")
def finished(finished_runs):
    """The place of a finished causal run; only to look at."""
    return finished_runs()


@pytest.fixture
def ran(finished, tmp_path):
    """A copy of the finished causal run, to change."""
    return finished.copy(tmp_path)


@pytest.fixture
def command():
    """Run a formary command in this process: arguments -> result with exit_code, stdout, stderr."""
    from typer.testing import CliRunner

    from formary.cli.main import app

    return lambda *arguments, input=None: CliRunner().invoke(app, [str(word) for word in arguments], input=input)
