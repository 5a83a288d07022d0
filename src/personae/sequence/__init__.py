"""Concept after concept: a model that somebody teaches, and comes back to."""
