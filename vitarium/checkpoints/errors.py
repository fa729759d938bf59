"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be had, cannot be read safely, or does not fit its model."""
