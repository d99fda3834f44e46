"""An encoder-decoder whose encoder reads pictures writes through the same engine as one that reads text."""

import pytest
import torch

from formary.errors import RequestError
from formary.infer.beam import beam_search
from formary.infer.engine import Engine, Request
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import build
from formary.tasks.protocol import Source

POSITIONS = 17  # 16 patches and the class vector


@pytest.fixture(scope="module")
def network():
    encoder = TransformerConfig(layers=2, width=32, heads=2, causal=False, position="none", context=POSITIONS)
    decoder = TransformerConfig(layers=2, width=32, heads=2, cross_attention=True, context=12)
    config = ModelConfig(
        topology="encoder_decoder",
        transformer=decoder,
        encoder=encoder,
        vocab_size=50,
        image_size=16,
        patch_size=4,
        channels=1,
        eos_id=1,
        decoder_start_id=0,
    )
    network = build(config, seed=3).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 6  # so that what is read decides what is written
    return network


def picture(seed):
    pixels = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Source(5 * pixels, POSITIONS)


@torch.inference_mode()
def greedy(network, source, count=8):
    written = [0]
    memory = network.encode(source.values[None])
    for _ in range(count):
        hidden = network.decode(torch.tensor([written]), memory)
        written.append(int(network.head(hidden[:, -1]).argmax()))
        if written[-1] == 1:
            break
    return written[1:]


def test_pictures_read_together_are_written_as_alone(network):
    sources = [picture(seed) for seed in range(5)]
    requests = [Request(prompt=source, max_tokens=8) for source in sources]
    written = [[] for _ in sources]
    for event in Engine(network, slots=3).generate(requests):
        written[event.request].append(event.token)
    assert written == [greedy(network, source) for source in sources]
    assert len({tuple(tokens) for tokens in written}) > 1  # pictures make a difference


def test_a_beam_of_one_is_the_greedy_answer(network):
    (found,) = beam_search(network, [0], source=picture(1), beams=1, max_tokens=8, stop_tokens=frozenset([1]))
    assert list(found.tokens) == greedy(network, picture(1))


def test_answers_to_one_picture_share_its_reading(network):
    engine = Engine(network, slots=4)
    list(engine.generate([Request(prompt=picture(0), max_tokens=3, n=3)]))
    assert engine.statistics.prompt_tokens == POSITIONS + 1


def test_a_text_for_what_reads_pictures_is_refused(network):
    with pytest.raises(RequestError, match="reads patches"):
        Engine(network).submit(Request(prompt=(3, 4)))
