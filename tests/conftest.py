"""What holds for every test: no network, and no short check of each of thousands of problems."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
# Each of the thousands of small problems here would be checked. What is on by default has tests of its own.
os.environ.setdefault("BILEVEL_SHORT_CHECK", "fit")
os.environ["COLUMNS"] = "160"  # tables are read whole, whatever the terminal

collect_ignore_glob = ["*conftest.py"]  # pytest loads them; collected for doctests as well, those of one name collide
