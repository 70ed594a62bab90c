"""Experiments. They use the library; nothing in the library uses them."""
