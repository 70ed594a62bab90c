"""Text files as examples of bytes."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import DataError

_ENDINGS = (".txt", ".jsonl")


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the texts of a folder's .txt and .jsonl files (or .gz of them), by their names without the ending.

    A line of a .jsonl file is an object with the key `text`.

    Raises:
        DataError: there are no such files, or one is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} is not a folder")
    found: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        plain = path.name.removesuffix(".gz")
        if not plain.endswith(_ENDINGS):
            continue
        name = plain.rsplit(".", 1)[0]
        if name in found:
            raise DataError(f"{folder} has two files for {name!r}; keep one of {name}.txt and {name}.jsonl")
        content = _content(path)
        found[name] = _texts_of(path, content) if plain.endswith(".jsonl") else content
    if not found:
        raise DataError(f"{folder} holds no .txt or .jsonl file; each source, and the target, needs one")
    return found


def examples(content: bytes, length: int) -> Tensor:
    """Cut a text into examples `[n, length]` of bytes; what does not fill an example is left out."""
    count = len(content) // length
    return torch.from_numpy(np.frombuffer(content, np.uint8, count * length).astype(np.int64)).reshape(count, length)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _texts_of(path: Path, content: bytes) -> bytes:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise DataError(f'{path}, line {number}: an object with the key "text" is needed, {{"text": "…"}}')
        texts.append(entry["text"].encode())
    return b"\n".join(texts)
