"""`python -m bilevel` is the command `bilevel`."""

from bilevel.cli.command import main

main()
