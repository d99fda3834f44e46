"""The house rules that no tool checks for us."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import formary

ROOT = Path(formary.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, formary; dir(formary); print(*{name.split('.')[0] for name in sys.modules})"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "formary" in shown.stdout.split() and not {"torch", "numpy", "pydantic"} & set(shown.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_owns(path):
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert said and len(said.split()) >= 5


def test_no_module_is_a_drawer_for_odds_and_ends():
    names = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "tools", "shared"}


def test_the_model_can_be_read_in_one_sitting():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "model").glob("*.py"))
    assert lines < 1600  # with an embedder and a head for each modality, and four topologies


def test_every_public_name_has_a_docstring():
    for name in formary.__all__:
        assert name == "__version__" or (getattr(formary, name).__doc__ or "").strip()


def test_nothing_unpickles_or_evaluates():
    refused = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not refused & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in refused, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "np.load"}, (
                    path,
                    called,
                )
