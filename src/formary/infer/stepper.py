"""A network with its cache: `read` and `prefill` take prompts, `decode` one token, `verify` a few tokens for each row.

Decoders and encoder-decoders look the same from above: token ids in, logits for the next token out.
It decides nothing: sampling, stopping and beams are the engine's and beam search's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from formary.errors import RequestError
from formary.infer.cache import KVCache
from formary.infer.fused import FusedDecoder, fits
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Encoder, EncoderDecoder, Network, TwoTowers
from formary.tasks.protocol import Source


class Stepper:
    """Feeds tokens to a decoder or an encoder-decoder, keeping keys and values in a `KVCache`.

    Args:
        slots: sequences held at once.
        context: longest sequence in tokens; the network's own context when left out.
    """

    def __init__(self, network: Network, *, slots: int, context: int | None = None) -> None:
        if isinstance(network, Encoder):
            raise RequestError(
                "this model is an encoder (such as BERT) and does not write text; "
                "Model.fill completes its masked words, or load a decoder or encoder-decoder"
            )
        if isinstance(network, TwoTowers) or not isinstance(network.head, LanguageHead):
            head = network.config.head
            what = "gives vectors" if head == "none" else f"has a head that scores labels ({head})"
            raise RequestError(f"this model {what} and does not write text; use predict")
        self.network: Decoder | EncoderDecoder = network
        self._head = network.head
        config = network.config
        self.context = min(context or config.context, config.context)
        self.vocab_size = config.vocab_size
        self.source_context = config.encoder.context if config.encoder is not None else 0
        weight = self._head.weight
        self.cache = KVCache(
            config.transformer,
            slots=slots,
            context=self.context,
            memory_context=self.source_context,
            exact=fits(network),
            dtype=weight.dtype,
            device=weight.device,
        )
        self.device = weight.device
        self._fused = FusedDecoder(network, self.cache) if fits(network) else None

    @torch.inference_mode()
    def prefill(
        self, start: int, prompts: Sequence[Sequence[int]], sources: Sequence[Sequence[int] | Source] = ()
    ) -> Tensor:
        """Read whole prompts into rows start, start + 1, ...; logits (prompts, vocab_size) after each one's last token.

        Args:
            prompts: token ids, at least one each; for an encoder-decoder what the target begins with.
            sources: an encoder-decoder's sources, one for each prompt: ids, or what else its encoder reads.
        """
        for row in range(start, start + len(prompts)):
            self.cache.clear(row)
        hidden = self.read(start, prompts, sources)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self.logits(hidden[torch.arange(len(prompts), device=self.device), ends])

    @torch.inference_mode()
    def read(
        self, start: int, pieces: Sequence[Sequence[int]], sources: Sequence[Sequence[int] | Source] = ()
    ) -> Tensor:
        """Feed some tokens to rows start, start + 1, ..., each after what it holds; hidden states (rows, seq, width).

        Pieces are padded on the right: causal attention never looks right, so padding changes nothing, and it is not
        counted into the rows' lengths.

        Args:
            sources: an encoder-decoder's source for each row, when its target begins with this piece.
        """
        memory = self._encode(sources) if sources else None
        lengths = [len(source) for source in sources] if sources else None
        counts = [len(piece) for piece in pieces]
        hidden = self._forward(start, _padded(pieces, self.device), counts, memory=memory, new_memory=lengths)
        self.cache.commit()
        return hidden

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to each of rows 0..len(tokens)-1; logits (rows, vocab_size) for what follows."""
        hidden = self._forward(0, torch.tensor(tokens, device=self.device)[:, None], [1] * len(tokens))
        self.cache.commit()
        return self.logits(hidden[:, -1])

    @torch.inference_mode()
    def verify(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Feed a few tokens to each of rows 0..len(pieces)-1; logits (rows, seq, vocab_size) after every one of them.

        What turns out to be wrong is taken back with `cache.truncate`.
        """
        return self.logits(self.read(0, pieces))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) in at least float32 from hidden states (..., width)."""
        logits: Tensor = self._head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.inference_mode()
    def token_logprobs(self, tokens: Sequence[int], source: Sequence[int] | None = None) -> list[float]:
        """Log-probability (natural) of each token but the first, given those before it; no cache is used."""
        if len(tokens) < 2:
            return []
        network = self.network
        given = torch.tensor(tokens[:-1], device=self.device)[None]
        with evaluating(network):
            if isinstance(network, EncoderDecoder):
                memory = network.encode(torch.tensor(source, device=self.device)[None])
                hidden = network.decode(given, memory)[0]
            else:
                hidden = network(given)[0]
        targets = torch.tensor(tokens[1:], device=self.device)
        logprobs: list[float] = []
        for piece, wanted in zip(
            torch.split(hidden, 256), torch.split(targets, 256)
        ):  # a whole context x vocabulary is large
            table = torch.log_softmax(self.logits(piece), dim=-1)
            logprobs += table.gather(1, wanted[:, None])[:, 0].tolist()
        return logprobs

    def _encode(self, sources: Sequence[Sequence[int] | Source]) -> Tensor:
        network = self.network
        assert isinstance(network, EncoderDecoder)
        values = [source.values for source in sources if isinstance(source, Source)]
        ids = [source for source in sources if not isinstance(source, Source)]
        read = torch.stack(values).to(self.device) if values else _padded(ids, self.device)
        lengths, mask = [len(source) for source in sources], None
        if min(lengths) != max(lengths):
            mask = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        with evaluating(network):
            return network.encode(read, mask=mask)

    def _forward(
        self,
        start: int,
        tokens: Tensor,  # (rows, seq)
        counts: Sequence[int],
        *,
        memory: Tensor | None = None,
        new_memory: list[int] | None = None,
    ) -> Tensor:
        network, cache = self.network, self.cache
        positions, mask, memory_mask = cache.begin(start, counts, new_memory=new_memory)
        with evaluating(network):
            if isinstance(network, EncoderDecoder):
                return network.decode(
                    tokens, memory, memory_mask=memory_mask, positions=positions, mask=mask, cache=cache
                )
            forward = network if self._fused is None else self._fused
            return forward(tokens, positions=positions, mask=mask, cache=cache)


def writes(network: Network) -> bool:
    """Whether a network writes text, so that it can be stepped."""
    return not isinstance(network, Encoder) and isinstance(network.head, LanguageHead)


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Dropout off; a network that is being trained goes back to training afterwards."""
    if not network.training:
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)
