"""The optimisers of `torch.optim` as update rules that can be differentiated."""
