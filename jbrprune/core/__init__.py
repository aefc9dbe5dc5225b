"""What every pass stands on: the model as a guest, batches, ranks, portions, objectives, agreement, whole files."""
