"""Relevance: passes over a model that give scores of channels, heads and single weights."""
