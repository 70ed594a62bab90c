"""What holds for every test: no network, and garbage collections that leave the collected tests alone."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
os.environ["COLUMNS"] = "160"  # tables are read whole, whatever the terminal

collect_ignore_glob = ["*conftest.py"]  # pytest loads them; collected for doctests as well, those of one name collide


def pytest_collection_finish() -> None:
    """Take the thousands of collected tests out of every later collection, of which the planner makes many."""
    gc.collect()
    gc.freeze()
