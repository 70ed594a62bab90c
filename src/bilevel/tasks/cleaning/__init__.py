"""Noisy labels: a weight for every training example, learnt from a few examples whose labels are known to be right."""
