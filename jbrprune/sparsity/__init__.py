"""Single weights: masks, patterns, and channels that contribute nothing."""
