"""Bi-level routing attention: every region of queries attends to a few regions of keys."""
