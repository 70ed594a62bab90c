"""Checkpoint files: nested dicts, lists and tuples of tensors, numbers and strings in one safetensors file.

Tensors are stored as tensors of the safetensors format. The structure around them is JSON in the file's header, with a
checksum of the whole content. Nothing is pickled, so a checkpoint file from an unknown source cannot run code. A file
is written completely or not at all.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bilevel.errors import CheckpointError
from bilevel.report.files import write_bytes

_FORMAT = "1"


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint file.

    Args:
        path: the file to write.
        content: a dict of tensors, numbers, strings, and dicts, lists and tuples of these.
        previous: the new name of an existing file at `path`, if there is one.

    Raises:
        TypeError: the content has a value that a checkpoint cannot hold.
    """
    write_bytes(path, _as_bytes(content), previous)


def require_storable(content: dict[str, Any]) -> None:
    """Raise the `TypeError` that `save` would raise for this content, without writing anything."""
    _encode(content, {})


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint file. All tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # The tensors are cloned, because they are views of the file, which may be replaced while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged ({error}); start again in another folder") from error
    if header.get("bilevel_format") != _FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint that this version of bilevel wrote")
    skeleton = header.get("skeleton", "")
    if header.get("checksum") != _checksum(skeleton, tensors):
        raise CheckpointError(
            f"the checkpoint {path} is damaged (its checksum is not that of its content); start again in another folder"
        )
    return _decode(json.loads(skeleton), tensors)


def _as_bytes(content: dict[str, Any]) -> bytes:
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_encode(content, tensors))
    header = {"bilevel_format": _FORMAT, "skeleton": skeleton, "checksum": _checksum(skeleton, tensors)}
    return safetensors.torch.save(tensors, metadata=header)


def _checksum(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(skeleton.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype == torch.complex128 or value.is_quantized or value.is_meta:
            raise TypeError(f"a checkpoint holds no tensor of {value.dtype}, {value.layout} on {value.device}")
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings, lists, tuples and dicts, not {value!r} ({type(value).__name__})"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_decode(v, tensors) for v in content)
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    return value
