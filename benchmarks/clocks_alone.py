"""Importing this module switches the short check off, so that clocks and memory meters show the estimates alone."""

import os

os.environ["BILEVEL_SHORT_CHECK"] = "off"  # read when an estimate begins; inherited by processes that are started
