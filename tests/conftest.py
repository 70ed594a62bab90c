"""What holds for every test: nothing goes over the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
os.environ["COLUMNS"] = "160"  # tables are read whole, whatever the terminal

collect_ignore_glob = ["*conftest.py"]  # pytest loads them; collected for doctests as well, those of one name collide
