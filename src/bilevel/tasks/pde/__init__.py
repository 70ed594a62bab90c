"""Discovery of a partial differential equation: unknown coefficients from a few observations of its solution."""
