"""Every task by its name in a recipe; other packages add labelled ones through the entry point group "formary.tasks"."""

from __future__ import annotations

from importlib.metadata import entry_points

from formary.errors import RecipeError, nearest
from formary.tasks.answer_span import AnswerSpan
from formary.tasks.caption import Caption
from formary.tasks.causal_lm import CausalLM
from formary.tasks.chat import Chat
from formary.tasks.classify import Classify
from formary.tasks.classify_image import ClassifyImage
from formary.tasks.classify_row import ClassifyRow
from formary.tasks.denoise import Denoise
from formary.tasks.detect import Detect
from formary.tasks.embed import Embed
from formary.tasks.forecast import Forecast
from formary.tasks.generate_image import GenerateImage
from formary.tasks.masked_lm import MaskedLM
from formary.tasks.match_image_text import MatchImageText
from formary.tasks.multiple_choice import MultipleChoice
from formary.tasks.next_item import NextItem
from formary.tasks.preference import Preference
from formary.tasks.protocol import LabelledTask, PretrainingTask
from formary.tasks.tag import Tag
from formary.tasks.translate import Translate

PRETRAINING: dict[str, type[PretrainingTask]] = {"causal_lm": CausalLM, "masked_lm": MaskedLM, "denoise": Denoise}
LABELLED: dict[str, type[LabelledTask]] = {
    "classify": Classify,
    "classify_image": ClassifyImage,
    "tag": Tag,
    "answer_span": AnswerSpan,
    "embed": Embed,
    "translate": Translate,
    "caption": Caption,
    "generate_image": GenerateImage,
    "match_image_text": MatchImageText,
    "chat": Chat,
    "preference": Preference,
    "multiple_choice": MultipleChoice,
    "next_item": NextItem,
    "forecast": Forecast,
    "detect": Detect,
    "classify_row": ClassifyRow,
}


def pretraining_task(name: str) -> type[PretrainingTask]:
    """The pretraining task of this name."""
    return PRETRAINING[name]


def labelled_task(name: str) -> type[LabelledTask] | None:
    """The labelled task of this name, ours or a plug-in's; None where `name` is a pretraining task.

    Raises:
        RecipeError: there is none; the nearest name is suggested.
    """
    if name in PRETRAINING:
        return None
    if name in LABELLED:
        return LABELLED[name]
    plugins = {entry.name: entry for entry in entry_points(group="formary.tasks")}
    if name in plugins:
        loaded: type[LabelledTask] = plugins[name].load()
        return loaded
    known = [*PRETRAINING, *LABELLED, *plugins]
    raise RecipeError(f"task: there is no '{name}'; {nearest(name, known) or 'tasks: ' + ', '.join(known)}")
