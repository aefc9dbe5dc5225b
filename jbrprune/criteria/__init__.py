"""Relevance of channels, heads and single weights."""
