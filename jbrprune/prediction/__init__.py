"""What a pruning would cost: predicted and measured damage."""
