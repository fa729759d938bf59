"""Architectures that take their attention from the families that differ in nothing else."""
