"""Token shards made in parts, by several processes: a stretch of the documents each, put together into what one would write.

A stretch ends where a document does, so the bytes do not depend on how many processes there were; parts that a killed
preparation left are taken as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from formary import durable
from formary.data.shards import Words, write_tokens
from formary.data.tokenizer import Tokenizer

PART_BYTES = 1 << 28
_CHUNK = 1 << 22


def stretches(documents: Path, part_bytes: int | None = None) -> list[tuple[int, int]]:
    """(begin, end) of stretches of a JSONL file of about `part_bytes` bytes, each of whole lines; together all of it."""
    each, total = part_bytes or PART_BYTES, documents.stat().st_size
    cuts = [0]
    with documents.open("rb") as stream:
        while cuts[-1] + each < total:
            stream.seek(cuts[-1] + each)
            stream.readline()
            cuts.append(stream.tell())
    ends = [*cuts[1:], total]
    return [(begin, end) for begin, end in zip(cuts, ends) if end > begin] or [(0, total)]


def write_token_parts(
    documents: Path,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    words: Words,
    end_of_document: bool,
    share: Callable[[Sequence[Any]], Sequence[Any]],
) -> None:
    """Encode those stretches that are this process's share and not done yet, into folders beside `folder`.

    Raises:
        as `shards.write_tokens`.
    """
    key = _key(documents, tokenizer, words, end_of_document)
    for number, (begin, end) in share(list(enumerate(stretches(documents)))):
        place = _place(folder, number)
        if durable.read_json(place / "part.json") != {"key": key}:
            write_tokens(
                documents, place, tokenizer, words=words, end_of_document=end_of_document, stretch=(begin, end)
            )
            durable.write_json(place / "part.json", {"key": key})


def join_token_parts(documents: Path, folder: Path) -> dict[str, Any]:
    """Put all parts together into `folder`, delete them, and return its meta.json.

    Raises:
        StorageError: the disk is full; nothing half-written is left.
    """
    places = [_place(folder, number) for number in range(len(stretches(documents)))]
    metas = [json.loads((place / "meta.json").read_text(encoding="utf-8")) for place in places]
    with durable.new_folder(folder) as temporary:
        files = {name: _joined([place / name for place in places], temporary / name) for name in metas[0]["files"]}
        meta = {
            **metas[0],
            "tokens": sum(meta["tokens"] for meta in metas),
            "documents": sum(meta["documents"] for meta in metas),
            "bytes": sum(meta["bytes"] for meta in metas),
            "files": files,
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    return meta


def _joined(sources: list[Path], target: Path) -> dict[str, Any]:
    """One array of several; starts count on from those before."""
    digest, total, offset = xxhash.xxh3_128(), 0, 0
    with target.open("wb") as out:
        for number, source in enumerate(sources):
            with source.open("rb") as stream:
                if target.name == "starts.bin" and number:
                    stream.seek(8)  # the 0 that every part begins with
                while chunk := stream.read(_CHUNK):
                    if target.name == "starts.bin":
                        starts = np.frombuffer(chunk, dtype="<i8") + offset
                        chunk = starts.astype("<i8").tobytes()
                        last = int(starts[-1])
                    out.write(chunk)
                    digest.update(chunk)
                    total += len(chunk)
            if target.name == "starts.bin":
                offset = last
    return {"bytes": total, "xxh3": digest.hexdigest()}


def _place(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}-part-{number:06d}")


def _key(documents: Path, tokenizer: Tokenizer, words: Words, end_of_document: bool) -> str:
    stat = documents.stat()
    made = xxhash.xxh3_128_hexdigest(tokenizer.backend.to_str().encode())
    return json.dumps([str(documents), stat.st_size, stat.st_mtime_ns, made, words, end_of_document])
