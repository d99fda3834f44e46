"""Heads over labels in checkpoints: which kind a checkpoint has, where its weights are, what its labels are called.

transformers' classes For... SequenceClassification, TokenClassification, QuestionAnswering and MultipleChoice are our
classify, tag, span and choice. Names and architectures tell them apart; families only say where they keep them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from formary.errors import CheckpointError
from formary.model.config import ModelConfig

LabelKind = Literal["classify", "tag", "span", "choice"]

_CLASSES: dict[LabelKind, str] = {
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}
_POOLED = ("classify", "choice")  # kinds that read one vector for a sequence
_PROBLEMS: dict[str, Literal["single", "multi", "regression"]] = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}


@dataclass(frozen=True)
class LabelHeads:
    """Where a family keeps its heads over labels.

    Args:
        stem: how the names of its classes in transformers begin.
        outputs: {kind: the last layer's name}; a kind that is left out cannot be read or written.
        pooler: the name of the dense layer before a classifier's last one; decoders have none, and no bias there.
        choice_pooler: that of multiple choice, where it is another one.
        activation: of the pooler.
        bias: whether a classifier's last layer has one; left out, where it has a pooler.
        classifier: what the name of a classifier's class ends in.
    """

    stem: str
    outputs: Mapping[LabelKind, str]
    pooler: str | None = None
    activation: Literal["tanh", "relu"] = "tanh"
    choice_pooler: str | None = None
    bias: bool | None = None
    classifier: str = _CLASSES["classify"]

    def place(self, ours: str, config: ModelConfig) -> str | None:
        """Their name for a weight of ours that has to do with a head over labels, else None."""
        places = {"head.output": next((at for kind, at in self.outputs.items() if kind == config.head), None)}
        if config.head in _POOLED:
            places["pooler.dense"] = self._pooler(config.head)
        module, _, last = ours.rpartition(".")
        place = places.get(module)
        return f"{place}.{last}" if place is not None else None

    def read(self, config: ModelConfig, hf: Mapping[str, Any], names: frozenset[str]) -> ModelConfig:
        """The config with the head over labels that config.json and the weights' names speak of, if they do.

        Raises:
            CheckpointError: the labels are not numbered from 0, or the problem type is not one Formary has.
        """
        kind = self._kind(hf, names)
        if kind is None:
            return config
        fixed: dict[str, tuple[str, ...]] = {"span": ("start", "end"), "choice": ("choice",)}
        labels = fixed.get(kind) or labels_of(hf)
        return dataclasses.replace(
            config,
            head=kind,
            head_bias=kind != "classify" or (self.pooler is not None if self.bias is None else self.bias),
            labels=labels,
            problem=_problem(hf, labels) if kind == "classify" else "single",
            pooler=kind in _POOLED and self.pooler is not None,
            pooler_activation=self.activation,
            next_sentence=False,
            tied_embeddings=True,
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the head; nothing where it is not one over labels."""
        name = next((name for kind, name in self._classes.items() if kind == config.head), None)
        if name is None:
            return {}
        said: dict[str, Any] = {"architectures": [self.stem + name]}
        if config.head in ("classify", "tag"):
            said["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
            said["label2id"] = {label: number for number, label in enumerate(config.labels)}
        if config.head == "classify":
            said["problem_type"] = next(theirs for theirs, ours in _PROBLEMS.items() if ours == config.problem)
        return said

    @property
    def _classes(self) -> dict[LabelKind, str]:
        return {**_CLASSES, "classify": self.classifier}

    def _pooler(self, kind: str) -> str | None:
        return self.choice_pooler if kind == "choice" and self.choice_pooler else self.pooler

    def _kind(self, hf: Mapping[str, Any], names: frozenset[str]) -> LabelKind | None:
        """By the class that config.json names; where it names none, by the weights that are there."""
        present = [kind for kind, place in self.outputs.items() if f"{place}.weight" in names]
        classes = hf.get("architectures") or []
        if classes:
            return next((kind for kind in present if any(name.endswith(self._classes[kind]) for name in classes)), None)
        present = [kind for kind in present if kind != "choice"]  # it has the names of another: only its class tells
        if len(present) < 2:
            return next(iter(present), None)
        # A classifier of sequences has a pooler before it or, behind a decoder, no bias; one of tokens the opposite.
        sequences = f"{self.pooler}.weight" in names if self.pooler else f"{self.outputs['classify']}.bias" not in names
        return next((kind for kind in present if kind == "span" or sequences == (kind == "classify")), None)


def labels_of(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the labels in the order of their numbers; as in transformers, two of them without other notice."""
    named = hf.get("id2label") or {number: f"LABEL_{number}" for number in range(hf.get("num_labels", 2))}
    labels = {int(number): str(label) for number, label in named.items()}
    if sorted(labels) != list(range(len(labels))):
        raise CheckpointError(f"id2label: the labels should be numbered 0 to {len(labels) - 1}, not {sorted(labels)}")
    return tuple(labels[number] for number in range(len(labels)))


def _problem(hf: Mapping[str, Any], labels: tuple[str, ...]) -> Literal["single", "multi", "regression"]:
    theirs = hf.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    if theirs not in _PROBLEMS:
        raise CheckpointError(f"problem_type '{theirs}' is not one Formary reads ({', '.join(_PROBLEMS)})")
    return _PROBLEMS[theirs]
