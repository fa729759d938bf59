"""Neighborhood attention: every query attends to its nearest keys."""
