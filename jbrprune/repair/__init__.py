"""Repairs without training and without labels."""
