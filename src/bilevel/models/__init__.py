"""Modules as trees of tensors: views, layers that recompute their activations, and modules sharded by FSDP."""
