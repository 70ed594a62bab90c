"""Data condensation (paper §4, Table 1)."""
