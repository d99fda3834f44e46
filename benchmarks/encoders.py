"""The encoders that benchmarks/inference.py measures Formary beside: CTranslate2's and ONNX Runtime's, in int8.

Each gets texts and gives vectors: the same tokenizer, like lengths together, the batch size that was fastest.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
BATCH_SIZES = (1, 8, 16, 32, 64)
LONGEST = 256  # tokens of a text, on all sides


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

    torch.manual_seed(0)  # the position type is every BERT's; CTranslate2's converter asks for it by name
    BertModel(BertConfig(position_embedding_type="absolute")).save_pretrained(str(folder))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
