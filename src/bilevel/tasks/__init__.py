"""The experiments. They use the library, and nothing in the library uses them except the command line."""
