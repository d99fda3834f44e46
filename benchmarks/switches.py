"""What each switch of learning speed is worth: validation loss after equal processor time, turned on or off against `fast`
without its ramp.

    python benchmarks/switches.py [--seeds 5] [--seconds 30] [--out switches.jsonl]
    python benchmarks/switches.py --text TEXT [--seconds 60] [--out switches.jsonl]
    python benchmarks/switches.py --table [--out switches.jsonl]

On recipes/shakespeare.yaml's characters, or on a text of your own with a byte-level BPE. A training ends when one thread has
computed for so many seconds (`time.process_time`, so that other work on the machine does not count); the schedule follows that
clock, and measuring is left out. Seeds are of weights and batches; every switch is tried under a seed before the next one.
Results are lines of JSON; what is there is not done again. --table prints them, with 95 % intervals of the difference to `fast`
paired by seed (Student's t): a switch wins, or loses, where the interval leaves out 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peers import ROOT, machine
from rich.console import Console
from scipy import stats

from formary.data import tokenizer as tokenizers
from formary.data.shards import TokenShards
from formary.model.topologies import build, parameter_count
from formary.pipeline.run import run as execute
from formary.recipe import Recipe, read
from formary.recipe.reading import parse
from formary.tasks.registry import pretraining_task
from formary.train.loop import validation_loss
from formary.train.machine import runtime
from formary.train.timed import train_for

SHAKESPEARE = ROOT / "recipes" / "shakespeare.yaml"
PLAIN = ["machine.threads=1", "machine.precision=float32", "train.validation_tokens=null"]
OF_TEXT = """
name: text
task: causal_lm
data:
  sources: [{text}]
  documents: paragraph
  clean: {{duplicates: false}}
  split: {{validation: 0.02, test: 0.0, duplicates: keep}}
  tokenizer: {{kind: bpe, vocab_size: 2048, sample_chars: 4000000}}
model: {{preset: fast, size: 4x128}}
train: {{steps: 300, batch: 16, context: 128, ramp: null}}
"""
# `shakespeare` and `fast` agree on optimiser and schedule; the recipe's feed-forward width keeps it within 0.81 M weights.
OF_SHAKESPEARE = ["model.preset=fast", "train.ramp=null"]


@dataclass(frozen=True)
class Switch:
    """One change to the preset.

    Args:
        says: what is changed, as the table has it.
        sets: the fields, by recipe where they differ.
        on: the recipes it means something on.
    """

    says: str
    sets: tuple[str, ...]
    on: tuple[str, ...] = ("shakespeare", "text")


_ADAMW = "{name: adamw, lr: 0.003, weight_decay: 0.1}"
_UNGATED = ("model.switches.gated=false", "model.switches.activation=relu2")
SWITCHES: dict[str, Switch] = {
    "fast": Switch("the preset without its ramp", ()),
    "muon": Switch("AdamW (lr 0.003) in place of Muon", (f"train.optimiser={_ADAMW}",)),
    "rope": Switch("learned positions in place of RoPE", ("model.switches.position=learned",)),
    "qk_norm": Switch("no QK-norm", ("model.switches.qk_norm=false",)),
    "relu2": Switch("ReLU^2, not gated, as many weights, in place of gated SiLU", _UNGATED),
    "zero_outputs": Switch("zero-initialised output projections", ("model.switches.initialisation=zero_outputs",)),
    "value_embeddings": Switch("value embeddings, one table", ("model.switches.value_embeddings=1",)),
    "value_embeddings_2": Switch("value embeddings, two tables", ("model.switches.value_embeddings=2",)),
    "logit_cap": Switch("logits capped at 15", ("model.switches.logit_cap=15",)),
    "ramp": Switch("sequences from a quarter of the context on, 30 % of the run", ("train.ramp.first={quarter}",)),
    "wsd": Switch("cosine to 0 in place of warm-up-stable-decay", ("train.schedule={name: cosine, final: 0.0}",)),
    "packing": Switch("attention within documents only", ("train.objective.cross_documents=false",), ("text",)),
}


def recipe_of(name: str, text: Path | None, switch: Switch, seed: int) -> Recipe:
    """The recipe with a switch turned."""
    own = [*PLAIN, f"train.seed={seed}"]
    if name == "shakespeare":
        base = read(SHAKESPEARE, [*OF_SHAKESPEARE, *own])
        # As many weights as gated: two matrices of 3/2 of the width in place of three.
        wide = ["model.switches.ffn_width=504"] if switch.sets == _UNGATED else []
        return read(SHAKESPEARE, [*OF_SHAKESPEARE, *own, *_filled(switch.sets, base), *wide])
    written = OF_TEXT.format(text=text)
    return parse(written, overrides=[*own, *_filled(switch.sets, parse(written))])


def _filled(sets: Iterable[str], recipe: Recipe) -> list[str]:
    return [field.replace("{quarter}", str(recipe.train.context // 4)) for field in sets]


def measure(recipe: Recipe, prepared: Path, seconds: float) -> dict[str, Any]:
    """Train for the time and measure the whole validation split."""
    settled = runtime(recipe.machine)
    task = pretraining_task(recipe.task)(recipe, tokenizers.load(prepared / "data" / "tokenizer"))
    network = build(task.model_config(), seed=recipe.train.seed)
    training = task.training_batches(TokenShards.open(prepared / "data/tokens/train"))
    done = train_for(seconds, task.loss, network, training, recipe.train, settled, clock=time.process_time)
    validation = task.validation_batches(TokenShards.open(prepared / "data/tokens/validation"), max_tokens=None)
    with torch.no_grad():
        loss = validation_loss(task.loss, network, validation, settled)
    found = {"loss": loss, "steps": done.steps, "tokens": done.tokens, "seconds": done.seconds}
    return found | {"weights": parameter_count(network), "diverged": done.diverged}


# The table --------------------------------------------------------------------------------------------------------------


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: for each text and budget, every switch beside the preset."""
    by_setting: dict[tuple[str, float], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for result in results:
        of_setting = by_setting.setdefault((result["recipe"], result["budget"]), {})
        of_setting.setdefault(result["switch"], {})[result["seed"]] = result
    parts = []
    for (recipe, budget), found in by_setting.items():
        seeds = len(found.get("fast", {}))
        lines = [
            f"`{recipe}`, {budget:g} s of one thread, {seeds} seeds:",
            "",
            "| switch | change | steps | loss (standard deviation) | difference to `fast` (95 %) | verdict |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(name, found[name], found.get("fast", {})) for name in SWITCHES if name in found]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(name: str, mine: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> str:
    losses = [result["loss"] for result in mine.values()]
    spread = f" ({statistics.stdev(losses):.3f})" if len(losses) > 1 else ""
    steps = statistics.median(result["steps"] for result in mine.values())
    mean, half = difference(mine, theirs)
    verdict, said = "", ""
    if name != "fast" and half is not None:
        verdict = "cannot tell" if abs(mean) <= half else "better" if mean < 0 else "worse"
        said = f"{mean:+.3f} ± {half:.3f}"
    return f"| `{name}` | {SWITCHES[name].says} | {steps:,.0f} | {statistics.mean(losses):.3f}{spread} | {said} | {verdict} |"


def difference(
    mine: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]
) -> tuple[float, float | None]:
    """Mean of the differences in loss under equal seeds, and half their 95 % interval; None for fewer than two."""
    found = [mine[seed]["loss"] - theirs[seed]["loss"] for seed in mine if seed in theirs]
    if len(found) < 2:
        return 0.0, None
    error = statistics.stdev(found) / len(found) ** 0.5
    return statistics.mean(found), float(stats.t.ppf(0.975, len(found) - 1)) * error


def recorded(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=None, help="a text file; Shakespeare's characters when left out")
    parser.add_argument("--seconds", type=float, default=None, help="30, with --text 60")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=None, metavar="SWITCH", help=f"of {', '.join(SWITCHES)}")
    parser.add_argument("--out", type=Path, default=Path("switches.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(recorded(arguments.out)))
        return
    torch.set_num_threads(1)
    text = arguments.text.resolve() if arguments.text else None
    kind, name = ("text", text.stem) if text else ("shakespeare", "shakespeare")
    budget = arguments.seconds or (60.0 if text else 30.0)
    names = [switch for switch in arguments.only or SWITCHES if kind in SWITCHES[switch].on]
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "run"
        first = recipe_of(kind, text, SWITCHES["fast"], 1)
        base = SHAKESPEARE.parent if text is None else Path()
        execute(first, base=base, folder=prepared, until="prepare", console=Console(quiet=True))
        for seed in range(1, arguments.seeds + 1):
            known = {(r["recipe"], r["budget"], r["switch"], r["seed"]) for r in recorded(arguments.out)}
            for switch in dict.fromkeys(["fast", *names]):
                if (name, budget, switch, seed) in known:
                    continue
                found = measure(recipe_of(kind, text, SWITCHES[switch], seed), prepared, budget)
                result = {"recipe": name, "budget": budget, "switch": switch, "seed": seed, **found}
                with arguments.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(result) + "\n")
                print(f"{name}, seed {seed}, {switch}: {found['loss']:.4f} after {found['steps']} steps", flush=True)
    print(table(recorded(arguments.out)))


if __name__ == "__main__":
    main()
