"""The package's front door: light to import, and every name on it opens."""

from __future__ import annotations

import subprocess
import sys

import pytest

import formary


def test_importing_formary_does_not_import_torch() -> None:
    code = "import sys, formary; formary.__version__; dir(formary); print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_found() -> None:
    from formary.infer.loaded import Model, load

    assert formary.load is load and formary.Model is Model
    assert formary.Recipe.__name__ == "Recipe"
    assert formary.__version__
    assert set(formary.__all__) <= set(dir(formary))


def test_a_name_it_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lode"):
        formary.lode  # noqa: B018
