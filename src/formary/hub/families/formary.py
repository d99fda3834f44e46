"""Formary's own layout: our config and our weight names as they are.

For switches that no Hugging Face family has, such as rotary positions with layer norms; transformers cannot open it.
"""

from __future__ import annotations

from formary.errors import CheckpointError
from formary.hub.families.family import Family, HfConfig
from formary.model.config import ModelConfig

_OURS_ONLY = ("model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    try:
        return ModelConfig.from_dict({key: value for key, value in hf.items() if key not in _OURS_ONLY})
    except TypeError as error:
        raise CheckpointError(f"a field is not one of this version's: {error}") from error


FORMARY = Family(
    name="formary",
    model_types=("formary",),
    config=_config,
    hf_config=lambda config: config.to_dict(),
    rules=lambda config: None,
)
