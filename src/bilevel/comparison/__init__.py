"""Comparison of methods at one point."""
