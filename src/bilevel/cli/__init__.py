"""The command `bilevel` and the words that a user types."""

from bilevel.cli.command import main

__all__ = ["main"]
