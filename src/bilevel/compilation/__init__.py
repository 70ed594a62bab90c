"""The inner gradient and its derivatives as compiled code."""
