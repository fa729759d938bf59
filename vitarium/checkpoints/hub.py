"""Files of the Hugging Face hub: huggingface_hub fetches and keeps them, we check their content."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch.hub
from filelock import FileLock
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitarium.checkpoints import lock
from vitarium.checkpoints.disk import digest
from vitarium.checkpoints.errors import CheckpointError
from vitarium.checkpoints.files import check_structure

_PathLike: TypeAlias = str | os.PathLike[str]

_NAMES = ("model.safetensors", "pytorch_model.bin")
_HUB = "https://huggingface.co"
_REPO = r"[\w.-]+(?:/[\w.-]+)?"
_ADDRESS = re.compile(rf"{re.escape(_HUB)}/({_REPO})/resolve/([^/?#]+)/([^?#]+)", re.ASCII)
_HASH = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")
# Its bases are whatever the HTTP library at hand raises when a connection fails.
_FAILURES: Any = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)


def hub_file(
    repo_id: str,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: _PathLike | None = None,
) -> Path:
    """A local file that holds a file of a hub repository, verified.

    huggingface_hub does the transfer and owns the cache; its variables (``HF_ENDPOINT``,
    ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_TOKEN``) and the proxies' count as it
    reads them, which is once, when it is imported. A file that its cache has is used from there
    without touching the network.

    The content is checked at every call: the cache names a file by the hash that the hub states,
    sha256 for large files and git's sha1 for small ones. A file that is not what its name says
    is renamed to ``<file>.bad`` and downloaded once more. Where the cache has no such names, as on
    Windows without symbolic links, the hub is asked for a download's hash, and later calls go by
    the lock file. A file that was there before, or comes from a mirror with hashes of its own,
    is taken as it is seen first: its frame is checked, a warning says that its hash is not known,
    and the lock file records it.

    Args:
        repo_id: ``organization/name``.
        filename: the file in the repository; None for ``model.safetensors``, or else
            ``pytorch_model.bin``.
        revision: a branch, a tag or a commit; None for ``main``.
        cache_dir: where huggingface_hub keeps its files, and we the lock file, if not in the
            folders of either.

    Raises:
        CheckpointError: the file cannot be had, or what came is not it.
    """
    what = repo_id if revision is None else f"{repo_id}@{revision}"
    names = _NAMES if filename is None else (filename,)
    cached = (_cached(repo_id, name, revision, cache_dir) for name in names)
    kept = next(filter(None, cached), None)
    aside = ""
    for _ in range(2):
        if kept is None:
            kept = _downloaded(what, repo_id, names, revision, cache_dir, aside)
        fault = kept.fault()
        if fault is None:
            if aside:
                warnings.warn(f"{what}: downloaded anew{aside}", stacklevel=2)
            kept.record()
            return kept.path
        aside = f"; the cached file was bad ({fault}) and is now {kept.set_aside()}"
        kept = None
    raise CheckpointError(f"{what}: what was downloaded is not what the hub announces{aside}")


def cached_hub_file(url: str, cache_dir: _PathLike | None = None) -> Path | None:
    """The file of a ``https://huggingface.co/<repo>/resolve/...`` address in the hub's cache.

    No network is touched, and nothing is changed.

    Args:
        url: any address.
        cache_dir: as for `hub_file`.

    Returns:
        The file, verified by its hash; None where the address is another one, or the cache lacks
        the file, has a bad one, or does not tell its hash.
    """
    match = _ADDRESS.fullmatch(url.partition("?")[0])
    if match is None:
        return None
    repo_id, revision, filename = map(urllib.parse.unquote, match.groups())
    try:
        kept = _cached(repo_id, filename, revision, cache_dir)
    except CheckpointError:
        return None  # a name that no hub would have
    if kept is None or kept.expected() is None or kept.fault() is not None:
        return None
    return kept.path


@dataclass(frozen=True)
class _Kept:
    """A file in huggingface_hub's cache.

    Attributes:
        path: where it is, in the snapshot of a commit.
        name: what lock files call it.
        url: its address at that commit, by which lock files know it.
        lock_files: those that count.
        stated: the hash that the hub has just stated, where the cache does not tell it.
    """

    path: Path
    name: str
    url: str
    lock_files: Sequence[Path]
    stated: str | None = None

    def named(self) -> str | None:
        """The hash by which the cache names it, if it does."""
        if not self.path.is_symlink():
            return None
        # One step: what it leads to may itself lead to a store that has names of another kind.
        name = Path(os.readlink(self.path)).name
        return name if _HASH.fullmatch(name) else None

    def expected(self) -> str | None:
        """The hash that it should have, sha256 or git's sha1, as far as anything tells."""
        named = self.named()
        if named is not None:
            return named
        recorded = lock.find(self.url, self.lock_files)
        return self.stated if recorded is None else recorded[0].sha256

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        expected = self.expected()
        try:
            if expected is None:
                check_structure(self.path)
                return None
            start = b"blob %d\0" % self.path.stat().st_size
            git = hashlib.sha1(start, usedforsecurity=False)
            actual = digest(self.path, git if len(expected) == 40 else hashlib.sha256())
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except CheckpointError as error:
            return str(error)
        return None if actual == expected else f"expected the hash {expected}, got {actual}"

    def set_aside(self) -> Path:
        """Rename it to ``.bad``, unless another process has; returns the new name."""
        file = self.path.resolve()
        bad = file.with_name(file.name + ".bad")
        try:
            with FileLock(f"{file}.lock"):
                if file.exists() and self.fault() is not None:
                    os.replace(file, bad)
        except OSError as error:
            raise CheckpointError(f"{file}: bad, and cannot be set aside: {error}") from error
        return bad

    def record(self) -> None:
        """Write down what it holds, where neither the cache nor a lock file will tell."""
        if self.named() is not None or lock.find(self.url, self.lock_files) is not None:
            return
        if self.stated is None:
            warnings.warn(
                f"{self.path}: its hash is not known, and {self.lock_files[-1]} now records it as "
                f"it is",
                stacklevel=3,
            )
        try:
            self.lock_files[-1].parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.lock_files[-1]}: cannot be written: {error}") from error
        sha256 = digest(self.path)
        new = lock.Record(self.name, self.path.stat().st_size, sha256)
        lock.record(self.url, new, self.lock_files)


def _cached(
    repo_id: str, filename: str, revision: str | None, cache_dir: _PathLike | None
) -> _Kept | None:
    for argument, name in (("filename", filename), ("revision", revision or "main")):
        if {"", ".", ".."} & {*name.split("/")} or re.search(r"[\\:\0]", name):
            raise CheckpointError(
                f"{repo_id}: {argument}: expected names with / between, none of them . or .., "
                f"got {name!r}"
            )
    folder = _expanded(cache_dir)
    try:
        found = try_to_load_from_cache(repo_id, filename, cache_dir=folder, revision=revision)
    except ValueError as error:
        raise CheckpointError(f"{repo_id}: {_first_line(error)}") from error
    return _kept(Path(found), repo_id, filename, cache_dir) if isinstance(found, str) else None


def _kept(path: Path, repo_id: str, filename: str, cache_dir: _PathLike | None) -> _Kept:
    commit = path.parents[filename.count("/")].name
    folder = _expanded(cache_dir) or Path(torch.hub.get_dir()) / "checkpoints" / "vitarium"
    url = f"{_HUB}/{repo_id}/resolve/{commit}/{filename}"
    return _Kept(path, f"{repo_id}/{filename}", url, lock.lock_files(folder))


def _downloaded(
    what: str,
    repo_id: str,
    names: tuple[str, ...],
    revision: str | None,
    cache_dir: _PathLike | None,
    aside: str,
) -> _Kept:
    """Have huggingface_hub download the first of ``names`` that the repository has."""
    for name in names:
        try:
            path = hf_hub_download(repo_id, name, revision=revision, cache_dir=_expanded(cache_dir))
            kept = _kept(Path(path), repo_id, name, cache_dir)
            if kept.named() is not None:
                return kept
            commit = kept.path.parents[name.count("/")].name
            etag = get_hf_file_metadata(hf_hub_url(repo_id, name, revision=commit)).etag or ""
            return replace(kept, stated=etag if _HASH.fullmatch(etag) else None)
        except _FAILURES as error:
            missing = isinstance(error, EntryNotFoundError)
            if not missing or isinstance(error, LocalEntryNotFoundError):
                reason = _reason(error, repo_id, cache_dir)
                raise CheckpointError(f"{what}: {reason}{aside}") from error
        except ValueError as error:  # a name that no hub would have
            raise CheckpointError(f"{what}: {_first_line(error)}{aside}") from error
    raise CheckpointError(f"{what}: has no file {' or '.join(names)}{aside}")


def _reason(error: Exception, repo_id: str, cache_dir: _PathLike | None) -> str:
    """Why huggingface_hub could not have a file, in one sentence."""
    # "Not in the cache" is what it says whenever the network fails; the cause tells how.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(cause, Exception):
        error = cause
    if isinstance(error, OfflineModeIsEnabled):
        folder = constants.HF_HUB_CACHE if cache_dir is None else cache_dir
        return f"not in huggingface_hub's cache ({folder}), and HF_HUB_OFFLINE forbids a download"
    if isinstance(error, GatedRepoError):
        return (
            f"access must be asked for at {constants.ENDPOINT}/{repo_id}; then it needs "
            f"`hf auth login` or HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} has no such repository, or a private one, which needs "
            f"`hf auth login` or HF_TOKEN"
        )
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers HTTP {error.response.status_code}"
    return f"cannot be had from {constants.ENDPOINT}: {_first_line(error)}"


def _expanded(folder: _PathLike | None) -> Path | None:
    return None if folder is None else Path(folder).expanduser()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
