"""Checkpoints come back as they went in, or not at all; files are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bilevel.errors import CheckpointError
from bilevel.report import files
from bilevel.training import checkpoint_files


def assert_same(left: Any, right: Any) -> None:
    """Equal in types, nesting, dtypes, shapes and values; NaN equals NaN."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*bits)
    elif isinstance(left, dict):
        assert type(right) is dict
        assert [(type(k), k) for k in left] == [(type(k), k) for k in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert type(left) is type(right)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert type(left) is type(right)
        assert left == right or (math.isnan(left) and math.isnan(right))


SHARED = torch.arange(4.0)

CONTENTS: dict[str, Any] = {
    "numbers": [0, -1, 2**70, 0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan, True, False, None],
    "strings": ["", "φ, \x00, \n, 🙂", 'quote" and \\'],
    "keys": {0: "int", "0": "str", 1.5: "float", None: "none", True: "bool", (1, "a"): "tuple"},
    "words of the encoding": {"tensor": "0", "tuple": [], "dict": [[1, 2]]},
    "nesting": {"a": [(), [], {}, ((1,), [2, (3, {"b": (4, None)})])]},
    "empty": {},
    "order": {"z": 1, "a": 2, "m": 3},
    "float64": torch.tensor([0.1, math.nan, math.inf, -0.0, 1e-320], dtype=torch.float64),
    "float32": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.tensor([[1.0, 0.1], [math.nan, -3.0]], dtype=torch.bfloat16),
    "float16": torch.tensor([1.0, 65504.0], dtype=torch.float16),
    "int64": torch.tensor([2**62, -1]),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.tensor([1 + 2j], dtype=torch.complex64),
    "without dimensions": [torch.tensor(0.1, dtype=torch.float64), torch.tensor(7), torch.tensor(True)],
    "without elements": [torch.zeros(0), torch.zeros(3, 0, 2, dtype=torch.bfloat16)],
    "not contiguous": [torch.arange(6.0).reshape(2, 3).T, torch.arange(9.0)[::2], torch.ones(1).expand(4)],
    "one storage": [SHARED, SHARED, SHARED[1:3], SHARED.view(2, 2)],
    "parameter": torch.nn.Parameter(torch.ones(2)).detach(),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    checkpoint_files.save(path, {name: CONTENTS[name]})
    assert_same({name: CONTENTS[name]}, checkpoint_files.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_everything_at_once(tmp_path: Path) -> None:
    checkpoint_files.save(tmp_path / "checkpoint", CONTENTS)
    assert_same(CONTENTS, checkpoint_files.load(tmp_path / "checkpoint"))


def test_subclasses_come_back_as_what_they_extend(tmp_path: Path) -> None:
    content = {"ordered": OrderedDict(a=1), "size": torch.zeros(2, 3).shape}
    checkpoint_files.save(tmp_path / "checkpoint", content)
    assert_same({"ordered": {"a": 1}, "size": (2, 3)}, checkpoint_files.load(tmp_path / "checkpoint"))


def test_a_graph_is_not_stored(tmp_path: Path) -> None:
    weight = torch.ones(2, requires_grad=True)
    checkpoint_files.save(tmp_path / "checkpoint", {"loss": (weight**2).sum()})
    assert not checkpoint_files.load(tmp_path / "checkpoint")["loss"].requires_grad


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Adafactor])
def test_the_state_of_an_optimizer(optimizer: Any, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    made = optimizer([weight])
    made.step()
    checkpoint_files.save(tmp_path / "checkpoint", made.state_dict())
    assert_same(made.state_dict(), checkpoint_files.load(tmp_path / "checkpoint"))


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    checkpoint_files.save(path, {"x": torch.arange(5.0)})
    loaded = checkpoint_files.load(path)["x"]
    stored = path.read_bytes()
    path.write_bytes(b"\xff" * len(stored))  # into the same file, as a careless copy would
    assert torch.equal(loaded, torch.arange(5.0))
    loaded += 1
    assert path.read_bytes() == b"\xff" * len(stored)


UNSTORABLE: dict[str, tuple[Any, str]] = {
    "object": (Path("a"), "Path"),
    "set": ({1}, "set"),
    "bytes": (b"a", "bytes"),
    "complex number": (1j, "complex"),
    "function": (len, "builtin_function"),
    "complex128": (torch.zeros(1, dtype=torch.complex128), "complex128"),
    "sparse": (torch.eye(2).to_sparse(), "sparse_coo"),
    "meta device": (torch.zeros(1, device="meta"), "meta"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_cannot_be_stored_leaves_no_file(name: str, tmp_path: Path) -> None:
    value, word = UNSTORABLE[name]
    content = {"fine": torch.ones(2), "deep": [({"it": value},)]}
    for attempt in (
        lambda: checkpoint_files.save(tmp_path / "new" / "checkpoint", content),
        lambda: checkpoint_files.require_storable(content),
    ):
        with pytest.raises(TypeError, match=word):
            attempt()
    assert not any(tmp_path.iterdir())


def test_require_storable_is_silent_otherwise() -> None:
    checkpoint_files.require_storable(CONTENTS)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    content = {
        "meta": [torch.arange(3, dtype=torch.float64), torch.tensor([[True, False]])],
        "step": 12,
        "config": {"lr": 0.1},
    }
    checkpoint_files.save(path, content)
    return path


def assert_refused(path: Path, damaged: bytes) -> None:
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged|not a checkpoint that this version"):
        checkpoint_files.load(path)
    assert path.read_bytes() == damaged


def test_a_file_cut_off_anywhere_is_refused(stored: Path) -> None:
    whole = stored.read_bytes()
    for length in range(len(whole)):
        assert_refused(stored, whole[:length])


def test_a_flipped_bit_anywhere_is_refused(stored: Path) -> None:
    """Or has no effect: a safetensors header has some slack, such as the blanks that fill it up."""
    whole = stored.read_bytes()
    original, refused = checkpoint_files.load(stored), 0
    for place in range(len(whole)):
        for bit in (0, 5):  # 5 turns a capital letter into a small one
            stored.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            try:
                loaded = checkpoint_files.load(stored)
            except CheckpointError:
                refused += 1
            else:
                assert_same(original, loaded)
    assert refused > 2 * len(whole) - 20


@pytest.mark.parametrize(("old", "new"), [(b'"F64"', b'"I64"'), (b'"BOOL","shape":[1,2]', b'"BOOL","shape":[2,1]')])
def test_another_dtype_or_shape_of_the_same_bytes_is_refused(old: bytes, new: bytes, stored: Path) -> None:
    whole = stored.read_bytes()
    assert old in whole
    assert_refused(stored, whole.replace(old, new))


@pytest.mark.parametrize("junk", [b"", b"\x00" * 8, b"\x80\x04}\x94.", b"not a checkpoint at all" * 20])
def test_junk_is_refused(junk: bytes, stored: Path) -> None:
    assert_refused(stored, junk)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"bilevel_format": "0", "skeleton": "{}"}])
def test_a_foreign_safetensors_file_is_refused(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert_refused(path, safetensors.torch.save({"weight": torch.ones(2)}, metadata=header))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint_files.load(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint_files.load(tmp_path)


# -- writing whole files -----------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Any, bytes]] = {
    "bytes": (lambda path: files.write_bytes(path, b"new"), b"new"),
    "text": (lambda path: files.write_text(path, "φ\n"), "φ\n".encode()),
    "json": (
        lambda path: files.write_json(path, {"a": [1, None]}),
        json.dumps({"a": [1, None]}, indent=2).encode() + b"\n",
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writing_makes_folders_and_replaces(name: str, tmp_path: Path) -> None:
    write, expected = WRITERS[name]
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):
        write(path)
        assert path.read_bytes() == expected
        path.write_bytes(b"something longer than what will replace it")
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("before", [b"old", None])
def test_a_failure_while_writing_changes_nothing(
    before: bytes | None, failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    if before is not None:
        path.write_bytes(before)
    seen_beside: list[str] = []

    def fail(*_: Any) -> None:
        seen_beside.extend(p.name for p in tmp_path.iterdir())
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        checkpoint_files.save(path, {"x": torch.ones(100)})
    assert any(name.startswith(".checkpoint.") for name in seen_beside)  # else there was nothing to clear away
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == (
        [] if before is None else [("checkpoint", before)]
    )


def test_under_its_name_a_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    replace, fsync, order = os.replace, os.fsync, []

    def watched(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> None:
            order.append((name, path.read_bytes()))
            function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", watched("fsync", fsync))
    monkeypatch.setattr(os, "replace", watched("replace", replace))
    files.write_bytes(path, b"new")
    assert order == [("fsync", b"old"), ("replace", b"old")]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_without_its_own_numbers_is_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "file", {"a": value})
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run[1]" / "check[1].safetensors"
    path.parent.mkdir()
    kept = ["check[1].safetensors", ".other.123", "check[1].safetensors.old", ".check1.safetensors.1"]
    for name in [*kept, ".check[1].safetensors.123", ".check[1].safetensors.4"]:
        (path.parent / name).write_bytes(b"")
    files.remove_leftovers(path)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(kept)
    files.remove_leftovers(tmp_path / "no such folder" / "file")
