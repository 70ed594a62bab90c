"""What holds for every test: no network, and no short check of each of thousands of problems."""

import os
import zlib

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
# Each of the thousands of small problems here would be checked. What is on by default has tests of its own.
os.environ.setdefault("BILEVEL_SHORT_CHECK", "fit")
os.environ["COLUMNS"] = "160"  # tables are read whole, whatever the terminal

collect_ignore_glob = ["*conftest.py"]  # pytest loads them; collected for doctests as well, those of one name collide


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `sampled(every=n)` leaves out of the fast tests: all cases of a function but about every n-th.

    The first case is kept, and of the others those that a checksum of their names picks, so that no parameter of a
    table is always left out.
    """
    seen: set[str] = set()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None:
            continue
        function = item.nodeid.split("[")[0]
        if function in seen and zlib.crc32(item.nodeid.encode()) % marker.kwargs["every"]:
            item.add_marker(pytest.mark.slow)
        seen.add(function)
