"""The model as its user meets it: text in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import formary
from formary.data import tokenizer as tokenizers
from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError
from formary.hub import checkpoint
from formary.infer.beam import beam_search
from formary.infer.loaded import Generation, Model, settings_from
from formary.model.topologies import EncoderDecoder, Network
from formary.recipe import schema

Make = Callable[..., Network]
TEXT = "The cat sat on the mat. The dog sat on the log. 猫坐在垫子上。 " * 3


@cache
def tokenizer_for(task: str) -> Tokenizer:
    kind = {"causal_lm": "bytes", "masked_lm": "wordpiece", "denoise": "characters"}[task]
    size = {"causal_lm": 300, "masked_lm": 45, "denoise": 300}[task]
    return tokenizers.train([TEXT], schema.Tokenizer(kind=kind, vocab_size=size), task=task)


@pytest.fixture
def writer(make_network: Make) -> Model:
    tokenizer = tokenizer_for("causal_lm")
    network = make_network("gpt-mini", vocab_size=tokenizer.vocab_size, context=64)
    return Model(network, tokenizer)


@pytest.fixture
def answerer(make_network: Make) -> Model:
    tokenizer = tokenizer_for("denoise")
    ids = {"decoder_start_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return Model(make_network("seq2seq-mini", vocab_size=tokenizer.vocab_size, context=64, **ids), tokenizer)


@pytest.fixture
def filler(make_network: Make) -> Model:
    tokenizer = tokenizer_for("masked_lm")
    return Model(make_network("bert-mini", vocab_size=tokenizer.vocab_size, context=64), tokenizer)


SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}


def test_one_prompt_gives_one_generation(writer: Model) -> None:
    found = writer.generate("The cat", **SAMPLED, seed=3)
    assert isinstance(found, Generation)
    assert found.text == str(found) == writer.tokenizer.decode(found.tokens)
    assert (len(found.tokens), found.finish_reason, found.prompt_tokens) == (12, "length", 7)
    assert found.logprobs is None and found.top_logprobs is None
    assert found == writer.generate("The cat", **SAMPLED, seed=3)
    assert found != writer.generate("The cat", **SAMPLED, seed=4)


def test_a_list_of_prompts_and_n_give_a_flat_list_each_as_alone(writer: Model) -> None:
    prompts = ["The cat", "The", "猫坐"]
    found = writer.generate(prompts, n=2, **SAMPLED)
    assert len(found) == 6
    for place, prompt in enumerate(prompts):
        assert found[2 * place : 2 * place + 2] == writer.generate(prompt, n=2, **SAMPLED)
    assert writer.generate(["The"], **SAMPLED) == [writer.generate("The", **SAMPLED)]
    assert writer.generate([]) == []


def test_more_prompts_than_slots_all_get_their_answer(writer: Model) -> None:
    prompts = [f"The {number}" for number in range(40)]
    found = writer.generate(prompts, temperature=1.0, max_tokens=2)
    assert found[39] == writer.generate("The 39", temperature=1.0, max_tokens=2)


def test_streamed_pieces_are_the_text_and_break_no_character(writer: Model) -> None:
    # One token is one byte; a bias towards the bytes of 猫 makes characters that take three tokens.
    bias = {token: 30.0 for token in writer.tokenizer.encode("猫")}
    options: dict[str, Any] = {"temperature": 1.0, "logit_bias": bias, "max_tokens": 30, "seed": 1}
    whole = writer.generate("x", **options)
    pieces = list(writer.stream("x", **options))
    assert "".join(pieces) == whole.text
    assert any("\u4e00" <= character <= "\u9fff" for character in whole.text)
    assert len(pieces) > 1 and all(pieces)


def test_a_stream_left_open_disturbs_nobody(writer: Model) -> None:
    stream = writer.stream("The cat", **SAMPLED)
    begun = next(stream)
    writer.generate("The dog", **SAMPLED)
    assert begun + "".join(stream) == writer.generate("The cat", **SAMPLED).text


def test_stop_strings_cut_the_text(writer: Model) -> None:
    text = writer.generate("The cat", **SAMPLED, seed=2).text
    stop = text[4:6]
    found = writer.generate("The cat", **SAMPLED, seed=2, stop=stop)
    assert (found.text, found.finish_reason) == (text[: text.index(stop)], "stop")


def test_logprobs_are_those_of_score(writer: Model) -> None:
    found = writer.generate("The cat", **SAMPLED, logprobs=2, echo=True)
    assert found.logprobs is not None and found.top_logprobs is not None and found.prompt_logprobs is not None
    written = writer.tokenizer.decode(found.tokens)
    assert found.text == "The cat" + written
    tokens = [*writer.tokenizer.encode("The cat"), *found.tokens]
    with torch.no_grad():
        table = writer.network.head(writer.network(torch.tensor([tokens])))[0].log_softmax(-1)
    expected = [float(table[place, token]) for place, token in enumerate(tokens[1:])]
    assert found.prompt_logprobs[0] is None
    assert [*found.prompt_logprobs[1:], *found.logprobs] == pytest.approx(expected)
    assert [len(top) for top in found.top_logprobs] == [2] * 12
    assert found.top_logprobs[0] == tuple((int(i), pytest.approx(float(v))) for v, i in zip(*table[6].topk(2)))


def test_score_judges_every_token_after_the_start_token(writer: Model) -> None:
    scores = writer.score(["The cat sat", "x", ""])
    assert [len(score) for score in scores] == [11, 1, 0]
    tokens = [writer.tokenizer.eos_id, *writer.tokenizer.encode("The cat sat")]
    with torch.no_grad():
        table = writer.network.head(writer.network(torch.tensor([tokens])))[0].log_softmax(-1)
    assert scores[0] == pytest.approx([float(table[place, token]) for place, token in enumerate(tokens[1:])])
    assert all(len(score) == 64 and math.isfinite(sum(score)) for score in writer.score(["a" * 64]))


def test_an_empty_prompt_begins_a_document(writer: Model) -> None:
    found = writer.generate("", **SAMPLED)
    assert found.prompt_tokens == 1 and len(found.tokens) == 12


def test_the_end_token_is_not_part_of_the_text(writer: Model) -> None:
    eos = writer.tokenizer.eos_id
    assert eos is not None
    found = writer.generate("The", logit_bias={eos: 100.0})
    assert (found.text, found.tokens, found.finish_reason) == ("", (eos,), "stop")


def test_defaults_come_from_the_generation_config_and_arguments_win(writer: Model) -> None:
    config = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "max_new_tokens": 5, "eos_token_id": [1]}
    assert settings_from(config) == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 5}
    model = Model(writer.network, writer.tokenizer, defaults=config)
    assert model.generate("The") == writer.generate("The", temperature=0.7, top_p=0.9, max_tokens=5)
    assert model.generate("The", top_p=None, max_tokens=9) == writer.generate("The", temperature=0.7, max_tokens=9)
    assert model.generate("The", temperature=0) == writer.generate("The", max_tokens=5)


def test_a_config_that_does_not_sample_is_greedy_but_a_filter_alone_samples(writer: Model) -> None:
    assert settings_from({"do_sample": False, "temperature": 0.5, "top_k": 50}) == {}
    assert writer.generate("The", top_p=0.95, max_tokens=9) == writer.generate(
        "The", temperature=1.0, top_p=0.95, max_tokens=9
    )
    assert writer.generate("The", top_p=0.95, temperature=0, max_tokens=9) == writer.generate("The", max_tokens=9)


def test_beams_are_those_of_beam_search(writer: Model) -> None:
    found = writer.generate("The", beams=4, n=2, max_tokens=6, length_penalty=0.5)
    expected = beam_search(
        writer.network,
        writer.tokenizer.encode("The"),
        beams=4,
        n=2,
        max_tokens=6,
        length_penalty=0.5,
        stop_tokens=frozenset([writer.tokenizer.eos_id or 0]),
    )
    assert [(one.tokens, one.score) for one in found] == [(best.tokens, best.score) for best in expected]
    assert found[0].text == writer.tokenizer.decode(found[0].tokens)


def test_an_encoder_decoder_answers_a_source_text(answerer: Model) -> None:
    network, tokenizer = answerer.network, answerer.tokenizer
    assert isinstance(network, EncoderDecoder)
    found = answerer.generate("The cat", max_tokens=5, logit_bias={tokenizer.eos_id or 0: -math.inf})
    source = torch.tensor([[*tokenizer.encode("The cat"), tokenizer.eos_id]])
    target = [tokenizer.pad_id]
    with torch.no_grad():
        for _ in range(5):
            logits = network.head(network(source, torch.tensor([target]))[0, -1])
            logits[tokenizer.eos_id] = -math.inf
            target.append(int(logits.argmax()))
        assert found.tokens == tuple(target[1:])
        scored = answerer.score(["The cat"], ["dog"])[0]
        wanted = [tokenizer.pad_id, *tokenizer.encode("dog"), tokenizer.eos_id]
        table = network.head(network(source, torch.tensor([wanted])))[0].log_softmax(-1)
    assert scored == pytest.approx([float(table[place, token]) for place, token in enumerate(wanted[1:])])
    assert answerer.generate("The cat", beams=2, max_tokens=5).score is not None


def test_the_sentinels_of_span_corruption_are_part_of_the_answer(answerer: Model) -> None:
    sentinel = answerer.tokenizer.sentinel_ids[0]
    found = answerer.generate("The cat", max_tokens=1, logit_bias={sentinel: 100.0})
    assert found.text == "<extra_id_0>"


def test_fill_gives_the_likeliest_tokens_at_each_mask(filler: Model) -> None:
    found = filler.fill("The [MASK] sat on [MASK].", top=3)
    tokens = filler.tokenizer.backend.encode("The [MASK] sat on [MASK].").ids
    places = [place for place, token in enumerate(tokens) if token == filler.tokenizer.mask_id]
    with torch.no_grad():
        table = filler.network.head(filler.network(torch.tensor([tokens])))[0, places].softmax(-1)
    for row, candidates in zip(table, found):
        assert [one.token for one in candidates] == row.topk(3).indices.tolist()
        assert [one.probability for one in candidates] == pytest.approx(row.topk(3).values.tolist())
        assert all(one.text for one in candidates)


def test_chat_renders_the_template_and_answers(writer: Model) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant:"
    model = Model(writer.network, writer.tokenizer, chat_template=template)
    messages = [{"role": "user", "content": "Hi"}]
    text = "user: Hi<|endoftext|>assistant:"
    assert model.render_chat(messages) == text
    assert model.chat_tokens(messages).count(writer.tokenizer.eos_id or 0) == 1
    found = model.chat(messages, **SAMPLED)
    assert found == model.generate(text, **SAMPLED)
    assert isinstance(found, Generation)
    assert "".join(model.stream_chat(messages, **SAMPLED)) == found.text


def test_what_cannot_be_followed_is_named(writer: Model, answerer: Model, filler: Model) -> None:
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: writer.generate("x", temprature=1), "did you mean 'temperature'"),  # type: ignore[call-overload]
        (lambda: writer.generate("x" * 65), "65 tokens are more than the context of 64"),
        (lambda: writer.stream("x", top_p=3), "top_p"),
        (lambda: writer.generate("x", beams=2, top_k=3), "top_k"),
        (lambda: writer.generate("x", length_penalty=2.0), "beams"),
        (lambda: writer.generate(3), "prompt"),  # type: ignore[call-overload]
        (lambda: writer.generate([3]), "prompt"),  # type: ignore[list-item]
        (lambda: writer.chat([{"role": "user", "content": "x"}]), "no chat template"),
        (lambda: writer.fill("a [MASK]"), "fill"),
        (lambda: writer.score("text"), "list"),
        (lambda: writer.score(["a" * 65]), "context"),
        (lambda: answerer.score(["text"]), "targets"),
        (lambda: answerer.generate("x", echo=True, max_tokens=2), "echo"),
        (lambda: answerer.generate("x" * 99), "encoder"),
        (lambda: filler.generate("x"), "does not write"),
        (lambda: filler.fill("no mask"), "MASK"),
    ]
    for call, named in calls:
        with pytest.raises(RequestError, match=named):
            call()


def test_a_saved_folder_opens_and_writes_as_before(writer: Model, tmp_path: Path) -> None:
    network = writer.network.float()
    checkpoint.save(tmp_path, network, generation={"do_sample": True, "temperature": 0.8, "max_new_tokens": 7})
    writer.tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    model = formary.load(tmp_path)
    assert model.defaults == {"temperature": 0.8, "max_tokens": 7}
    assert model.generate("The cat") == Model(network, writer.tokenizer).generate(
        "The cat", temperature=0.8, max_tokens=7
    )
    assert model.render_chat([{"role": "user", "content": "Hi"}]) == "Hi"
    assert (model.folder, model.config.context) == (tmp_path, 64)
