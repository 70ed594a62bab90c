"""The costs of each method on a problem, and the choice of a method."""
