"""`vitarium embed`: embeddings of any number of images, by one process, many, or Ray's."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import fields

from vitarium.embedding.embedder import Embedder, Settings


def run(args: Namespace) -> int:
    """Make what is missing; images that cannot be read get a line on stderr, and the rest goes on.

    Raises:
        ValueError: what the arguments name does not fit or is not there, or, where they are
            ``strict``, an image cannot be read.
        CheckpointError: the weights cannot be had or do not fit.
        OSError: the shards cannot be written; those that were finished stay.
    """
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.ray is None:
        rows, failed = Embedder(settings).run()
    else:
        from vitarium.embedding import cluster

        rows, failed = cluster.run(settings, args.ray or None)
    if os.environ.get("RANK", "0") == "0":
        print(f"{rows} embeddings, {len(failed)} images that cannot be read")
        print(f"wrote {settings.out}")
    return 0
