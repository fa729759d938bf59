"""Checkpoints: find, download, verify, read, convert and load them, whole or not at all."""

from vitarium.checkpoints.download import adopt, fetch
from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import outline, read
from vitarium.checkpoints.hub import hub_file
from vitarium.checkpoints.loading import Report, check_fits, compare, convert, load
from vitarium.checkpoints.renames import Renames
from vitarium.checkpoints.weights import Weight
from vitarium.checkpoints.wrappers import unwrap

__all__ = [
    "CheckpointError",
    "Renames",
    "Report",
    "Weight",
    "adopt",
    "check_fits",
    "compare",
    "convert",
    "fetch",
    "hub_file",
    "load",
    "outline",
    "read",
    "unwrap",
]
