"""Checkpoints: find, download, verify, read, convert and load them, whole or not at all."""

from vitarium.checkpoints.download import adopt, fetch
from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import read
from vitarium.checkpoints.loading import Report, compare, convert, load
from vitarium.checkpoints.renames import Renames
from vitarium.checkpoints.weights import Weight
from vitarium.checkpoints.wrappers import unwrap

__all__ = [
    "CheckpointError",
    "Renames",
    "Report",
    "Weight",
    "adopt",
    "compare",
    "convert",
    "fetch",
    "load",
    "read",
    "unwrap",
]
