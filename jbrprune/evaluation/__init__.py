"""What a model does: its agreement with a reference, its latency."""
