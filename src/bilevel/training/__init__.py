"""The outer loop: its steps and phases, its metrics and checkpoint files, and how a run is resumed."""
