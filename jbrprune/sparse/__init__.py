"""Single weights: how many, which, and the seam to `torch.nn.utils.prune`."""
