"""The families of models that the hub reads and writes; this is the one place that lists them.

A new family is one file with a `Family` and one entry here.
"""

from formary.hub.families.bart import BART
from formary.hub.families.bert import BERT, DISTILBERT, ROBERTA
from formary.hub.families.clip import CLIP
from formary.hub.families.family import Family
from formary.hub.families.formary import FORMARY
from formary.hub.families.gpt2 import GPT2
from formary.hub.families.llama import LLAMA, QWEN2, QWEN3
from formary.hub.families.t5 import T5
from formary.hub.families.vit import DEIT, VIT
from formary.hub.families.yolos import YOLOS

# In the order in which a writer asks them; the last represents everything.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (GPT2, LLAMA, QWEN2, QWEN3, BERT, ROBERTA, DISTILBERT, BART, T5, VIT, DEIT, YOLOS, CLIP, FORMARY)
}
