"""Attention inside windows that cut a map, shifted or not."""
