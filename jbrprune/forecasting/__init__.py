"""What removing units would change, to first order, and how far that can be trusted."""
