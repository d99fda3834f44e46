"""Predictions in the precision that is asked for."""

from __future__ import annotations

import pytest
import torch

from formary.errors import RequestError
from formary.infer.precision import autocast, cpu_multiplies_bfloat16, fast_precision


@pytest.mark.parametrize(("precision", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_are_in_the_precision_asked_for(precision: str, expected: torch.dtype) -> None:
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_auto_is_bfloat16_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_precision("cpu") == ("bfloat16" if cpu_multiplies_bfloat16() else "float32")
    for flags, expected in (({"avx2"}, "float32"), ({"avx2", "avx512_bf16"}, "bfloat16")):
        monkeypatch.setattr("formary.infer.precision.cpu_flags", lambda flags=flags: flags)
        assert fast_precision("cpu") == expected


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(RequestError, match="'half' is not known; choose one of auto, float32, bfloat16"):
        autocast("half", torch.device("cpu"))
