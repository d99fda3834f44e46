"""What people can try first in the playground, for each of its tabs, in English and Chinese."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"text": "Explain in two sentences why the sky is blue."},
        {"text": "Write a short poem about a lighthouse."},
        {"text": "用两句话解释天空为什么是蓝色的。"},
    ],
    "complete": [
        {"text": "Once upon a time, in a village by the sea,"},
        {"text": "The three most important ideas in physics are"},
        {"text": "从前有一座山，山里有"},
    ],
    "translate": [
        {"text": "The weather is beautiful today."},
        {"text": "Where is the railway station?"},
        {"text": "今天天气很好。"},
    ],
    "rewrite": [
        {"text": "The tower is 324 metres tall, about the same height as an 81-storey building."},
        {"text": "这座塔高三百二十四米。"},
    ],
    "fill": [
        {"text": "The capital of France is [MASK]."},
        {"text": "She poured herself a [MASK] of tea."},
        {"text": "今天天气很[MASK]。"},
    ],
    "classify": [
        {"text": "It arrived on time, fits perfectly, and I would buy it again."},
        {"text": "You have won a prize! Reply now to claim it for free."},
        {"text": "房间很干净，服务也很好，下次还会来。"},
    ],
    "tag": [
        {"text": "Ada Lovelace met Charles Babbage in London in 1833 ."},
        {"text": "The quick brown fox jumps over the lazy dog ."},
        {"text": "王小明去年在北京大学读书。"},
    ],
    "span": [
        {
            "question": "When was the tower finished?",
            "context": "The Eiffel Tower was built by the company of Gustave Eiffel. Work began in January 1887, and the "
            "tower was finished on 31 March 1889, in time for the World's Fair in Paris.",
        },
        {
            "question": "What do bees make from nectar?",
            "context": "Bees visit flowers for nectar and pollen. They carry the nectar home in a crop and turn it into "
            "honey, which feeds the colony through the winter.",
        },
    ],
    "embed": [
        {
            "texts": [
                "A cat sleeps on the sofa.",
                "A kitten is napping on the couch.",
                "The stock market fell sharply on Monday.",
                "Shares lost much of their value at the start of the week.",
            ]
        },
        {"texts": ["今天天气很好。", "阳光明媚，适合出门。", "他正在学习数学。"]},
    ],
    "choose": [
        {
            "question": "Which of these is a mammal?",
            "choices": ["A trout", "A bat", "An eagle", "A frog"],
        },
        {"question": "I poured water on the fire, so", "choices": ["it went out.", "it burned brighter."]},
    ],
    "forecast": [],  # a series has the step and the columns of its model
    "row": [],
    "picture": [],
    "match": [],
    "paint": [],
    "recommend": [],
}
