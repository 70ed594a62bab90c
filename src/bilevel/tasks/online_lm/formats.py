"""Readers for SQuAD, StreamingQA and ArchivalQA in local files, compressed (.gz) or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bilevel.errors import DataError
from bilevel.tasks.online_lm.documents import Corpus, Document, Question

_PARTS = {"train": ("train",), "validation": ("valid", "validation", "val"), "test": ("test", "dev", "eval")}
_KEYS = ("sorting_key", "evidence_id", "para_id", "doc_id", "id")
_REFERENCES = ("evidence_id", "para_id", "doc_id")


def squad(folder: Path) -> Corpus:
    """Read SQuAD (v1.1 or v2.0) as published: one JSON file with `train` in its name and one with `dev`.

    As in the paper, the train file is used to tune the base model, to train the weight model and, at its end, for
    validation. The dev file is used for the test. The paragraphs of the train file are split in the order of the file,
    49 : 44 : 7, because neighbouring paragraphs belong to one article.

    Raises:
        DataError: the files are missing or damaged.
    """
    files = _json_files(folder)
    train, test = (_squad_documents(_one(folder, files, part)) for part in ("train", "test"))
    return _split(folder, train, None, test)


def table(folder: Path) -> Corpus:
    """Read StreamingQA or ArchivalQA from `.jsonl` or `.csv` files of questions.

    The files have `train` and `test` (or `eval`) in their names. A file with `valid` in its name is optional. Their
    columns are `question` and `answers` (or `answer`), and either `text` or the id of a document (`evidence_id`,
    `para_id`). The documents are then in a further file with `doc` or `para` in its name, with columns `sorting_key`,
    `para_id` or `id`, and `text`.

    Raises:
        DataError: the files are missing or damaged.
    """
    files = [p for p in sorted(folder.iterdir()) if p.name.removesuffix(".gz").endswith((".jsonl", ".csv"))]
    texts: dict[str, str] = {}
    sources = [p for p in files if "doc" in p.name.lower() or "para" in p.name.lower()]
    for path in sources:
        texts.update(_texts(path))
    asked = [p for p in files if p not in sources]
    validation = None
    if any(_is_of(p, "validation") for p in asked):
        validation = _table_documents(_one(folder, asked, "validation"), texts)
    train, test = (_table_documents(_one(folder, asked, part), texts) for part in ("train", "test"))
    return _split(folder, train, validation, test)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, compressed or not.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _split(folder: Path, train: list[Document], validation: list[Document] | None, test: list[Document]) -> Corpus:
    first = round(0.49 * len(train))
    second = len(train) if validation is not None else round(0.93 * len(train))
    chosen = train[second:] if validation is None else validation
    parts = (train[:first], train[first:second], chosen, test)
    for name, documents in zip(("tune", "meta", "validation", "test"), parts, strict=True):
        if not documents:
            raise DataError(f"{folder}: no document with a question is left for the part {name!r}")
    others = [p for p in folder.iterdir() if p.name.removesuffix(".gz") == "locality.txt"]
    locality = [line for path in others for line in read_text(path).splitlines() if line.strip()]
    return Corpus(*parts, locality=locality or [each.text for each in parts[0]])


def _json_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.name.removesuffix(".gz").endswith(".json")]


def _one(folder: Path, files: Sequence[Path], part: str) -> Path:
    found = [p for p in files if _is_of(p, part)]
    if not found:
        names = ", ".join(p.name for p in files) or "no such file at all"
        raise DataError(
            f"{folder} has no file for {part} (with {' or '.join(_PARTS[part])} in its name): it has {names}"
        )
    if len(found) > 1:
        raise DataError(f"{folder} has several files for {part}: {', '.join(p.name for p in found)}; keep one")
    return found[0]


def _is_of(path: Path, part: str) -> bool:
    """Whether one of the words in the file's name, such as `eval` in `qa_eval.jsonl`, stands for this part."""
    return any(word in _PARTS[part] for word in re.split(r"[^a-z]+", path.name.lower()))


def _squad_documents(path: Path) -> list[Document]:
    try:
        content = json.loads(read_text(path))
        articles = content.get("data", [content])
        pairs = [
            (paragraph["context"], [(q["question"], [a["text"] for a in q["answers"]]) for q in paragraph["qas"]])
            for article in articles
            for paragraph in article["paragraphs"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not in SQuAD's format: {type(error).__name__} {error}") from error
    return usable(path, pairs)


def usable(path: Path, pairs: Iterable[tuple[str, list[tuple[str, list[str]]]]]) -> list[Document]:
    """Return the documents that have a text and a question with an answer.

    A warning says how many documents and questions are left out.
    """
    documents, empty, unanswered, unasked = [], 0, 0, 0
    for text, asked in pairs:
        if not text.strip():
            empty += 1
            continue
        answered = [(q, tuple(a for a in answers if a.strip())) for q, answers in asked]
        good = tuple(Question(q, answers) for q, answers in answered if answers and q.strip())
        unanswered += len(asked) - len(good)
        if good:
            documents.append(Document(text, good))
        else:
            unasked += 1
    counts = {
        "empty documents": empty,
        "questions without an answer": unanswered,
        "documents without a question": unasked,
    }
    left_out = [f"{count} {what}" for what, count in counts.items() if count]
    if left_out:
        warnings.warn(f"{path}: left out {', '.join(left_out)}", stacklevel=3)
    return documents


def _texts(path: Path) -> dict[str, str]:
    found = {}
    for number, row in enumerate(_rows(path), start=1):
        key = next((row[k] for k in _KEYS if row.get(k) not in (None, "")), None)
        if key is None or not isinstance(row.get("text"), str):
            raise DataError(
                f"{path}, record {number}: needs `text` and one of {', '.join(_KEYS)}; has {', '.join(row)}"
            )
        found[str(key)] = row["text"]
    return found


def _table_documents(path: Path, texts: dict[str, str]) -> list[Document]:
    asked: dict[str, list[tuple[str, list[str]]]] = {}
    missing = 0
    for number, row in enumerate(_rows(path), start=1):
        if "question" not in row or not ({"answers", "answer"} & row.keys()):
            raise DataError(
                f"{path}, record {number}: needs `question` and `answers` or `answer`; has {', '.join(row)}"
            )
        text = row.get("text")
        if text is None:
            key = next((str(row[k]) for k in _REFERENCES if row.get(k) not in (None, "")), None)
            text = None if key is None else texts.get(key)
        if text is None:
            missing += 1
            continue
        answers = _answers(path, number, row["answers"] if "answers" in row else row["answer"])
        asked.setdefault(text, []).append((str(row["question"]), answers))
    if missing:
        if not asked:
            raise DataError(
                f"{path}: no question has a document; put the documents' texts beside it in a file with `doc` in its "
                "name (columns sorting_key or para_id, and text), or into a column `text`"
            )
        warnings.warn(f"{path}: left out {missing} questions whose document is in no file", stacklevel=3)
    return usable(path, asked.items())


def _answers(path: Path, number: int, value: Any) -> list[str]:
    """Read the answers from a list, the text of a list in JSON or Python, or the text of a single answer."""
    if isinstance(value, str) and value.startswith("["):
        import ast

        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{path}, record {number}: answers {value!r} is no list") from error
    return [str(each) for each in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _rows(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".csv"):
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number} is damaged: {error}") from error
    return rows
