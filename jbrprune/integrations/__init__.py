"""The seams to torch-pruning and torch.nn.utils.prune."""
