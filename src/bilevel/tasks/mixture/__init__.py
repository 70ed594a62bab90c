"""Mixtures: the proportions of several sources of training data for which a model does best on a target."""
