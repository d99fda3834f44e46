"""What a model runs in is decided by measuring it, and said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import RequestError
from formary.infer import probe
from formary.infer.kernels import Int8Linear, available
from formary.infer.loaded import Model
from formary.model.topologies import Network
from formary.recipe import schema

Make = Callable[..., Network]
pytestmark = pytest.mark.skipif("int8" not in available(), reason="this machine has no eight-bit product")


@pytest.fixture
def make_model(make_network: Make) -> Callable[..., Model]:
    def make(name: str = "gpt-mini", **switches: object) -> Model:
        tokenizer = train_tokenizer(
            ["abcdefghijklmnopqrstuvwxyz ABC,.\n"], schema.Tokenizer(kind="characters"), task="causal_lm"
        )
        network = make_network(name, vocab_size=tokenizer.vocab_size, context=128, **switches).float()
        return Model(network, tokenizer)

    return make


def is_rounded(model: Model) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.network.modules())


def test_float32_is_the_model_itself_and_int8_a_rounded_one(make_model: Callable[..., Model]) -> None:
    model = make_model()
    same, choice = model.in_precision("float32")
    assert same.network is model.network and choice.precision == "float32"
    rounded, choice = model.in_precision("int8")
    assert is_rounded(rounded) and not is_rounded(model) and choice.rise is not None and abs(choice.rise) < 0.05
    assert rounded.generate("abc", max_tokens=5).finish_reason == "length"


def test_auto_keeps_a_model_whose_perplexity_would_rise(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_rise", lambda *_: 0.02)
    model, choice = make_model().in_precision("auto")
    assert not is_rounded(model) and choice.precision == "float32" and "2.0%" in choice.reason


def test_auto_keeps_a_model_that_would_be_slower_and_takes_one_that_is_faster(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_rise", lambda *_: 0.0)
    for speedup, precision in ((0.8, "float32"), (1.7, "int8")):
        monkeypatch.setattr(probe, "_speedup", lambda *_, speedup=speedup: speedup)
        model, choice = make_model().in_precision("auto")
        assert choice.precision == precision and is_rounded(model) == (precision == "int8")


@pytest.mark.parametrize(
    ("rise", "spread", "parts", "expected"),
    [
        (0.004, 0.01, 1, 0.004),  # clearly below one per cent
        (0.05, 0.1, 1, 0.05),  # clearly above
        (0.005, 0.4, 6, 0.005),  # the text ends before it is clear
        (math.inf, 0.0, 1, math.nan),
    ],
)
def test_more_of_the_text_is_read_until_the_rise_is_clear(
    monkeypatch: pytest.MonkeyPatch, rise: float, spread: float, parts: int, expected: float
) -> None:
    read: list[str] = []
    noise = np.random.default_rng(0).normal(0, spread, 3000)
    noise = (noise - noise.mean()).reshape(6, 500)

    def logprobs(network: str, part: int, source: None) -> np.ndarray:
        read.append(network)
        return np.full(500, -3.0) - (noise[part] + math.log1p(rise) if network == "rounded" else 0.0)

    monkeypatch.setattr(probe, "_logprobs", logprobs)
    found = probe._rise("network", "rounded", list(range(6)), None)  # type: ignore[arg-type]
    assert read.count("rounded") == read.count("network") == parts
    assert found == pytest.approx(expected, abs=spread / 20 if parts == 1 else 1e-6, nan_ok=True)


def test_the_speed_of_both_is_measured(make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_rise", lambda *_: 0.0)
    choice = make_model().in_precision("auto")[1]
    assert choice.speedup is not None and 0 < choice.speedup < 100


def test_perplexity_is_that_of_the_probabilities(make_network: Make) -> None:
    network = make_network("gpt2-mini")
    tokens = torch.randint(40, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logprobs = network.head(network(tokens)).log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
    assert math.isclose(
        math.exp(-probe._logprobs(network, tokens, None).mean()), math.exp(-logprobs.mean()), rel_tol=1e-5
    )


def test_encoders_and_encoder_decoders_can_be_rounded_when_asked(make_model: Callable[..., Model]) -> None:
    for name in ("bert-mini", "seq2seq-mini"):
        rounded, choice = make_model(name).in_precision("int8")
        assert is_rounded(rounded) and choice.precision == "int8"
    assert make_model("bert-mini").in_precision("auto")[1].precision == "float32"
    masked = make_model("bert-mini").in_precision("int8")[0]
    if masked.tokenizer.mask_id is not None:
        assert len(masked.fill("ab[MASK]c")[0]) == 5


def test_a_decoder_that_answers_with_labels_stays_as_it_is_and_can_be_rounded(make_model: Callable[..., Model]) -> None:
    model = make_model(head="tag", labels=("a", "b"))
    kept, choice = model.in_precision("auto")
    assert not is_rounded(kept) and choice.reason == "it reads and does not write"
    rounded, _ = model.in_precision("int8")
    given = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        exact, found = (each.network.head(each.network(given)) for each in (model, rounded))
    assert is_rounded(rounded) and (found - exact).norm() < 0.1 * exact.norm()


def test_an_unknown_precision_is_refused_by_name(make_model: Callable[..., Model]) -> None:
    with pytest.raises(RequestError, match="'int4' is not known; choose one of auto, float32, int8"):
        make_model().in_precision("int4")


def test_the_sample_texts_are_in_the_package() -> None:
    for name, characters in (("sample.txt", 12000), ("sample.zh.txt", 3000)):
        assert len((Path(probe.__file__).parent / name).read_text(encoding="utf-8")) > characters


def test_the_text_that_the_model_finds_likelier_judges(make_network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        (Path(probe.__file__).parent / name).read_text(encoding="utf-8") for name in ("sample.txt", "sample.zh.txt")
    ]
    tokenizer = train_tokenizer(texts, schema.Tokenizer(kind="bytes"), task="causal_lm")
    network = make_network("gpt-mini", vocab_size=tokenizer.vocab_size, context=128).float()
    first = [tokenizer.encode(text)[:20] for text in texts]
    for liked in (0, 1):
        monkeypatch.setattr(
            probe, "_likely", lambda _, tokens, liked=liked: -1.0 if tokens[:20] == first[liked] else -9.0
        )
        calibrating, parts = probe._sample(network, tokenizer)
        assert calibrating[0, :20].tolist() == first[liked]
        assert len(parts) == 5 and all(part.shape == (1, 128) for part in parts)
