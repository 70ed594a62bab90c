"""Solvers of linear systems that are known only by products with vectors."""
