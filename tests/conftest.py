"""What holds for every test: no network, and no short check of each of thousands of problems."""

import os
import zlib

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
# Each of the thousands of small problems here would be checked. What is on by default has tests of its own.
os.environ.setdefault("BILEVEL_SHORT_CHECK", "fit")
os.environ["COLUMNS"] = "160"  # tables are read whole, whatever the terminal

collect_ignore_glob = ["*conftest.py"]  # pytest loads them; collected for doctests as well, those of one name collide


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of a GPU where there is none, and mark as slow what `sampled(every=n)` leaves out of the fast tests.

    Of the cases of a function, about every n-th stays: the first one, and of the others those that a checksum of their
    names picks, so that no parameter of a table is always left out.
    """
    no_gpu = None if torch.cuda.is_available() else pytest.mark.skip(reason="needs an NVIDIA GPU")
    seen: set[str] = set()
    for item in items:
        if no_gpu is not None and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
        marker = item.get_closest_marker("sampled")
        if marker is None:
            continue
        function = item.nodeid.split("[")[0]
        if function in seen and zlib.crc32(item.nodeid.encode()) % marker.kwargs["every"]:
            item.add_marker(pytest.mark.slow)
        seen.add(function)
