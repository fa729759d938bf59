"""The two products of neighborhood attention, each by itself."""
