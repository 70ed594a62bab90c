"""Corpora by name."""

from __future__ import annotations

from pathlib import Path

from bilevel.errors import DataError
from bilevel.tasks.online_lm import formats, grammar
from bilevel.tasks.online_lm.config import DataName
from bilevel.tasks.online_lm.documents import Corpus


def load(name: DataName, data_dir: Path | None, seed: int) -> Corpus:
    """Return the documents of a corpus.

    Args:
        name: the name of the corpus. `grammar` needs no files.
        data_dir: the folder with the files of the other corpora.
        seed: the seed of `grammar`, which is different for every seed.

    Raises:
        DataError: the files are missing or damaged.
    """
    if name == "grammar":
        return grammar.corpus(seed)
    if data_dir is None:
        raise DataError(f"{name} is read from files: pass --data-dir FOLDER, see bilevel.tasks.online_lm.formats")
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder")
    return formats.squad(data_dir) if name == "squad" else formats.table(data_dir)
