"""Criteria to compare relevance with: each a function that returns scores, all else being equal."""
