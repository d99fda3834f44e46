"""Eight-bit products against float64 ones, and against themselves in other company; also as native code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.errors import RequestError
from formary.infer import compiled
from formary.infer.between import digits_of
from formary.infer.engine import Engine, Request
from formary.infer.fused import FusedDecoder, parts_of
from formary.infer.kernels import Int8Head, Int8Linear, available, pack, product, quantised, weight_bytes
from formary.infer.sampling import SamplingSettings
from formary.infer.stepper import Stepper
from formary.model.topologies import Network

Make = Callable[..., Network]
pytestmark = pytest.mark.skipif("int8" not in available(), reason="this machine has no eight-bit product")
WRITERS = {
    "gpt2-mini": {},
    "gpt-mini": {"heads": 4, "kv_heads": 2},
    "gpt-mini ": {"heads": 4, "kv_heads": 1, "qk_norm": True, "bias": True},
}


def writer(make_network: Make, name: str, **switches: object) -> Network:
    return make_network(name.strip(), vocab_size=60, context=900, **{**WRITERS[name], **switches}).float()


@pytest.fixture(params=["plain", pytest.param("native", marks=pytest.mark.slow)])
def prepared(request: pytest.FixtureRequest, make_network: Make, name: str, steps: Path) -> Network:
    """A writer in eight bits, its steps as plain torch or as native code."""
    network = quantised(writer(make_network, name), torch.tensor([tokens(96)]))
    if request.param == "native":
        if not compiled.compiler():
            pytest.skip("no C++ compiler here")
        compiled.build(*parts_of(network).all)
    assert FusedDecoder(network, Stepper(network, slots=1).cache).compiled == (request.param == "native")
    return network


@pytest.fixture
def steps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where compiled steps are kept: nowhere for plain tests, one place for all native ones."""
    native = request.node.callspec.params.get("prepared") == "native"
    folder = tmp_path_factory.getbasetemp() / "native" if native else tmp_path_factory.mktemp("none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 10**6))
def test_a_row_has_the_same_bits_alone_and_beside_rows_of_any_size(
    rows: int, width: int, out: int, fine: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = pack(torch.randn(out, width, generator=generator), fine=fine)
    sizes = 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    vectors = torch.randn(rows, width, generator=generator) * sizes
    together = product(vectors, packed)
    for row in range(rows):
        assert torch.equal(product(vectors[row : row + 1], packed)[0], together[row])


@settings(deadline=None)
@given(st.integers(16, 200), st.integers(0, 10**6))
def test_products_are_near_the_exact_ones_and_two_digits_are_nearer(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, vectors = torch.randn(30, width, generator=generator), torch.randn(5, width, generator=generator)
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scales).round() * scales
    exact, of_rounded = vectors.double() @ weight.double().T, vectors.double() @ rounded.double().T
    one, two = product(vectors, pack(weight)), product(vectors, pack(weight, fine=True))
    size = vectors.norm(dim=1).max() * weight.norm(dim=1).max()
    assert (one - exact).abs().max() < 0.1 * size  # at worst, sqrt(width) times half a step of both
    assert (two - of_rounded).abs().max() < 3e-4 * size


def test_a_row_of_zeros_gives_zeros() -> None:
    vectors = torch.randn(3, 12)
    vectors[1] = 0
    for fine in (False, True):
        assert torch.equal(product(vectors, pack(torch.randn(8, 12), fine=fine))[1], torch.zeros(8))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.integers(1, 6), st.integers(0, 10**6))
def test_a_column_shared_out_adds_up_to_what_it_was(shares: list[int], rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(shares)
    weight = torch.randn(16, len(shares), generator=generator)
    packed = pack(weight, shares=counts)
    vectors = torch.randn(rows, len(shares), generator=generator) * counts
    digits, unit = digits_of(vectors, 1, 127, packed.split)
    assert digits.abs().max() <= 127 and torch.equal(digits, digits.round())
    whole_columns = digits[:, : len(shares)].index_add(1, packed.split[1], digits[:, len(shares) :])
    assert torch.equal(whole_columns, (vectors / unit).round())
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    expected = (whole_columns * unit).double() @ ((weight / scales).round() * scales).double().T
    assert torch.allclose(product(vectors, packed).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_large_column_is_shared_out_and_many_get_a_second_digit(make_network: Make) -> None:
    for large, fine in ((1, False), (12, True)):
        network = writer(make_network, "gpt2-mini")
        with torch.no_grad():
            network.transformer.blocks[1].ffn_norm.weight[:large] = 100.0
            network.transformer.blocks[1].ffn.input.weight[:, :large] = 0.0
        into = [block.ffn.input.packed for block in quantised(network, torch.tensor([tokens(96)])).transformer.blocks]
        assert [packed.fine for packed in into] == [fine, fine]  # all of a kind alike
        assert fine or into[1].split[0][0] > 4


@pytest.mark.parametrize("name", [*WRITERS, "bert-mini", "seq2seq-mini", "bart-base"])
def test_a_rounded_network_answers_like_its_original_which_is_not_changed(make_network: Make, name: str) -> None:
    network = make_network(name.strip(), vocab_size=60, context=160, **WRITERS.get(name, {})).float()
    given = torch.tensor([tokens(96)])
    source = torch.tensor([tokens(50, 1)]) if network.config.encoder is not None else None
    inputs = (given,) if source is None else (source, given)
    with torch.no_grad():
        before = network.head(network(*inputs))
        rounded = quantised(network, given, source=source)
        after = rounded.head(rounded(*inputs))
        assert torch.equal(network.head(network(*inputs)), before)
    assert not any(isinstance(module, torch.nn.Linear) for module in rounded.modules())
    # T5's scores are not divided by anything: random ones answer 1 % of noise with 45 %
    assert (after - before).norm() < (0.45 if name == "seq2seq-mini" else 0.1) * before.norm()
    assert rounded.embedder.tokens.weight is network.embedder.tokens.weight  # type: ignore[union-attr]
    assert 0.24 < weight_bytes(rounded) / weight_bytes(network) < 0.31  # so narrow layers get many extra columns


def test_an_output_matrix_of_its_own_and_a_tied_one_are_both_rounded(make_network: Make) -> None:
    for tied in (True, False):
        rounded = quantised(writer(make_network, "gpt2-mini", tied_embeddings=tied), torch.tensor([tokens(64)]))
        assert isinstance(rounded.head, Int8Head) and isinstance(rounded.transformer.blocks[0].ffn.input, Int8Linear)


def test_float64_weights_are_refused(make_network: Make) -> None:
    with pytest.raises(RequestError, match="needs float32 weights"):
        quantised(make_network("gpt2-mini"), torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("name", WRITERS)
def test_the_few_operations_compute_what_the_modules_compute(make_network: Make, name: str, prepared: Network) -> None:
    network = writer(make_network, name)
    read = tokens(70, 2)
    with torch.no_grad():
        exact = network.head(network(torch.tensor([read])))[0, -1]
        modules = prepared.head(prepared(torch.tensor([read])))[0, -1]
    fused = Stepper(prepared, slots=2).prefill(0, [read])[0]
    assert (fused - modules).norm() <= (modules - exact).norm()  # rounding may fall the other way, no more


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("length", [100, 700])
def test_logits_have_the_same_bits_however_the_tokens_are_read(name: str, length: int, prepared: Network) -> None:
    stepper = Stepper(prepared, slots=4)
    text = tokens(length, 3)
    alone = stepper.prefill(0, [text])[0]
    beside = [tokens(30, 4), tokens(7, 5), tokens(length * 5 // 4, 6)]
    assert torch.equal(stepper.prefill(0, [text, *beside])[0], alone)
    for cut in (1, 33, 64, 99):
        stepper.cache.clear(0)
        at = 0
        for piece in (cut, length - cut - 1, 1):
            if piece:
                hidden = stepper.read(0, [text[at : at + piece]])
            at += piece
        assert torch.equal(stepper.logits(hidden[0, -1]), alone), cut
    stepper.prefill(0, [text[:-1], beside[0], beside[2]])
    assert torch.equal(stepper.decode([text[-1], 1, 2])[0], alone)
    stepper.prefill(0, [text[:-5], beside[0]])
    assert torch.equal(stepper.verify([text[-5:], [1, 2]])[0, 4], alone)
    stepper.prefill(1, [text, beside[0]])
    assert torch.equal(stepper.prefill(2, [text])[0], alone)  # and so in rows that are not the first


@pytest.mark.parametrize("name", WRITERS)
def test_answers_are_the_same_alone_and_in_any_company(name: str, prepared: Network) -> None:
    requests = [
        Request(
            tuple(tokens(5 + 11 * place, place)),
            SamplingSettings(temperature=place % 2 * 1.0, seed=place),
            max_tokens=12 + place,
            stop_tokens=frozenset(),
        )
        for place in range(7)
    ]

    def answers(engine: Engine, wanted: list[Request]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in wanted]
        for event in engine.generate(wanted):
            found[int(event.request)].append(event.token)
        return found

    alone = [answers(Engine(prepared, slots=1), [request])[0] for request in requests]
    assert answers(Engine(prepared, slots=4), requests) == alone
    assert answers(Engine(prepared, slots=7, chunk=16, prefix_cache_tokens=512), requests * 2) == alone * 2
    speculating = [Request(**{**vars(request), "speculate": True}) for request in requests]
    assert answers(Engine(prepared, slots=3), speculating) == alone
