"""Saving and loading pruned models without pickle."""
