"""Sampling filters, greedy text and beam search beside Hugging Face transformers, with the same weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from formary.data.chat import render
from formary.infer.beam import beam_search
from formary.infer.engine import Engine, Request
from formary.infer.sampling import History, SamplingSettings, Table, process
from formary.model.topologies import Decoder, EncoderDecoder, Network, build
from formary.recipe.presets import preset

LOGITS = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"temperature": 0.6}, TemperatureLogitsWarper(0.6)),
        ({"top_k": 17}, TopKLogitsWarper(17)),
        ({"top_p": 0.83}, TopPLogitsWarper(0.83)),
        ({"min_p": 0.07}, MinPLogitsWarper(0.07)),
        ({"typical_p": 0.4}, TypicalLogitsWarper(0.4)),
    ],
)
def test_each_filter_leaves_the_distribution_that_transformers_leaves(options: dict[str, Any], theirs: Any) -> None:
    table = Table([SamplingSettings(**{"temperature": 1.0, **options})] * len(LOGITS))
    ours = process(LOGITS, table, [None] * len(LOGITS)).softmax(-1)
    torch.testing.assert_close(ours, theirs(None, LOGITS.clone()).softmax(-1))


def test_all_filters_in_a_row_leave_the_distribution_that_transformers_leaves() -> None:
    past = torch.randint(0, 300, (6, 20), generator=torch.Generator().manual_seed(1))
    options = SamplingSettings(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.95, repetition_penalty=1.3)
    ours = process(LOGITS, Table([options] * 6), [History(300, row.tolist()) for row in past]).softmax(-1)
    expected = LOGITS.clone()
    for step in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.9),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.01),
        TypicalLogitsWarper(0.95),
    ):
        expected = step(past, expected)
    torch.testing.assert_close(ours, expected.softmax(-1))


def vivid(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)


def gpt2_pair() -> tuple[GPT2LMHeadModel, Network]:
    """A tiny GPT-2 in transformers, and ours with its weights."""
    config = GPT2Config(
        vocab_size=14, n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=7, pad_token_id=7
    )
    config.tie_word_embeddings = False
    theirs = GPT2LMHeadModel(config).eval()
    vivid(theirs)
    ours = build(
        preset("gpt2-mini", vocab_size=14, context=40, size="2x32", switches={"heads": 4, "tied_embeddings": False})
    )
    assert isinstance(ours, Decoder)
    source, target = theirs.transformer, ours.transformer
    with torch.no_grad():
        ours.embedder.tokens.weight.copy_(source.wte.weight)
        assert ours.embedder.positions is not None
        ours.embedder.positions.weight.copy_(source.wpe.weight)
        ours.head.weight.copy_(theirs.lm_head.weight)
        for theirs_block, block in zip(source.h, target.blocks):
            block.attention_norm.load_state_dict(theirs_block.ln_1.state_dict())
            block.ffn_norm.load_state_dict(theirs_block.ln_2.state_dict())
            for linear, conv in (
                (block.attention.qkv, theirs_block.attn.c_attn),
                (block.attention.output, theirs_block.attn.c_proj),
                (block.ffn.input, theirs_block.mlp.c_fc),
                (block.ffn.output, theirs_block.mlp.c_proj),
            ):
                linear.weight.copy_(conv.weight.T)
                linear.bias.copy_(conv.bias)
        target.norm.load_state_dict(source.ln_f.state_dict())
    return theirs, ours.eval()


def bart_pair() -> tuple[BartForConditionalGeneration, Network]:
    """A tiny BART in transformers, and ours with its weights."""
    config = BartConfig(
        vocab_size=14, max_position_embeddings=40, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    theirs = BartForConditionalGeneration(config).eval()
    vivid(theirs)
    theirs.tie_weights()
    theirs.final_logits_bias.normal_(0, 1.0, generator=torch.Generator().manual_seed(4))
    theirs.final_logits_bias[0, 2] = 2.0  # so that some answers end
    ours = build(preset("bart-base", vocab_size=14, context=40, size="2x32", switches={"heads": 4}))
    assert isinstance(ours, EncoderDecoder)
    with torch.no_grad():
        ours.embedder.tokens.weight.copy_(theirs.model.shared.weight)
        ours.head.bias.copy_(theirs.final_logits_bias[0])
        for embedder, stack, source in (
            (ours.embedder, ours.encoder, theirs.model.encoder),
            (ours.decoder_embedder, ours.transformer, theirs.model.decoder),
        ):
            embedder.positions.weight.copy_(source.embed_positions.weight)
            embedder.norm.load_state_dict(source.layernorm_embedding.state_dict())
            for block, layer in zip(stack.blocks, source.layers):
                block.attention_norm.load_state_dict(layer.self_attn_layer_norm.state_dict())
                block.ffn_norm.load_state_dict(layer.final_layer_norm.state_dict())
                block.ffn.input.load_state_dict(layer.fc1.state_dict())
                block.ffn.output.load_state_dict(layer.fc2.state_dict())
                block.attention.output.load_state_dict(layer.self_attn.out_proj.state_dict())
                join(block.attention.qkv, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
                if block.has_cross:
                    block.cross_norm.load_state_dict(layer.encoder_attn_layer_norm.state_dict())
                    block.cross.output.load_state_dict(layer.encoder_attn.out_proj.state_dict())
                    join(block.cross.query, layer.encoder_attn.q_proj)
                    join(block.cross.key_value, layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
    return theirs, ours.eval()


def join(fused: torch.nn.Linear, *parts: torch.nn.Linear) -> None:
    fused.weight.copy_(torch.cat([part.weight for part in parts]))
    fused.bias.copy_(torch.cat([part.bias for part in parts]))


PROMPTS = [[5, 9, 11], [3, 3, 13, 4, 12, 8], [10, 1, 2]]
PAIRS = {"gpt2": gpt2_pair, "bart": bart_pair}
STOPS = {"gpt2": 7, "bart": 2}


def their_answer(output: Any, name: str, prompt: list[int], stop: int) -> tuple[int, ...]:
    ids = output.tolist()[1 if name == "bart" else len(prompt) :]
    return tuple(ids[: ids.index(stop) + 1] if stop in ids else ids)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    theirs, ours = PAIRS[name]()
    stop = STOPS[name]
    requests = [Request(tuple(prompt), max_tokens=20, prefix=(2,), stop_tokens=frozenset([stop])) for prompt in PROMPTS]
    found: dict[Any, list[int]] = {}
    for event in Engine(ours).generate(requests):
        found.setdefault(event.request, []).append(event.token)
    for place, prompt in enumerate(PROMPTS):
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, num_beams=1)[0]
        assert tuple(found[place]) == their_answer(output, name, prompt, stop)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_four_beams_find_what_those_of_transformers_find(name: str) -> None:
    theirs, ours = PAIRS[name]()
    stop = STOPS[name]
    reasons = set()
    rules: list[tuple[float, Any]] = [(1.0, False), (1.0, True), (0.0, "never"), (2.0, "never"), (-1.0, False)]
    for prompt, (penalty, early) in itertools.product(PROMPTS, rules):
        output = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, num_beams=4, num_return_sequences=3,
            length_penalty=penalty, early_stopping=early, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        found = beam_search(
            ours,
            [2] if name == "bart" else prompt,
            source=prompt if name == "bart" else None,
            beams=4,
            n=3,
            max_tokens=12,
            length_penalty=penalty,
            early_stopping=early,
            stop_tokens=frozenset([stop]),
        )
        assert [one.tokens for one in found] == [their_answer(row, name, prompt, stop) for row in output.sequences]
        assert [one.score for one in found] == pytest.approx(output.sequences_scores.tolist(), abs=1e-4)
        reasons |= {(early, one.finish) for one in found}
    assert {(False, "stop"), (False, "length"), (True, "stop")} <= reasons  # the rules had something to decide


TEMPLATES = [
    "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n<u>{{ m.content | trim }}</u>\n    {%- else %}\n{{ m | tojson }}\n    {%- endif %}\n{%- endfor %}\n",
    "{% set ns = namespace(n=0) %}\n{% for m in messages if m.role != 'system' %}\n  {% set ns.n = ns.n + 1 %}\n[{{ ns.n }}] {{ m.content }}\n{% if loop.last and add_generation_prompt %}\n{% generation %}go{% endgeneration %}\n{% endif %}\n{% endfor %}",
    "{{ bos_token }}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{{ messages[-1]['content'][:3] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_render_as_transformers_renders_them(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": "system", "content": "être <brief>"},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello & \"welcome\""},
        {"role": "user", "content": "Bye"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for opens in (True, False):
        expected, _ = render_jinja_template(
            conversations=[messages], chat_template=template, tools=tools, add_generation_prompt=opens, bos_token="<s>"
        )
        found = render(template, messages, tools=tools, add_generation_prompt=opens, bos_token="<s>")
        assert found == expected[0]
