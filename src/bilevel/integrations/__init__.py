"""Inner loops that run in other programs and libraries."""
