"""Saved models and interrupted runs."""
