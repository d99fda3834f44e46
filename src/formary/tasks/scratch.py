"""The model that a recipe asks to train from scratch: its preset, size and switches for a tokenizer and a topology."""

from __future__ import annotations

import dataclasses

from formary.data.tokenizer import Tokenizer
from formary.model.config import ModelConfig, Topology
from formary.model.presets import preset
from formary.recipe.schema import Recipe


def scratch_config(recipe: Recipe, tokenizer: Tokenizer, topology: Topology) -> ModelConfig:
    """The config of the recipe's model section, with the tokenizer's vocabulary and ids and the training context.

    Raises:
        RecipeError: the preset is of another topology, or the sizes do not fit together.
    """
    config = preset(
        recipe.model.preset,
        vocab_size=tokenizer.vocab_size,
        context=recipe.train.context,
        size=recipe.model.size,
        switches=recipe.model.switches,
        topology=topology,
    )
    return dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
