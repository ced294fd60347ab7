"""Repositories of the Hugging Face Hub: fetched into its cache, checked, and pushed to.

The cache is that of huggingface_hub, so other programs share it. A model is either whole in it or not there: both files come
from one commit, each is held against the hash that the Hub gave, and a branch moves to a commit only when all are there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .files import whole_file
from .trust import Weights, is_weights_name, on_meta
from .version import installed_version

logger = logging.getLogger("unetlib")

RETRIES = (0.5, 2.0)  # seconds to wait before asking again a Hub that answers 500 and more
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repository(name: str) -> bool:
    """Whether a string has the form `owner/name`, and no weights file's ending, by which `from_pretrained` takes it for one.

    Example:
        >>> is_repository("someone/cars"), is_repository("./cars"), is_repository("a/b/c"), is_repository("runs/best.pth")
        (True, False, False, False)
    """
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and not is_weights_name(name)


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path of a file or folder, with `~` as the home folder.

    Raises:
        FileNotFoundError: for the home folder of a user who is not here.

    Example:
        >>> local_path("~/models").name
        'models'
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"{str(name)!r} names the home folder of a user who is not here; for your own type '~/...'"
        ) from None


def fetch(
    repo: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder in the Hub's cache that holds a repository's files, all of one commit.

    A commit that is cached needs no network. For a branch or tag the Hub is asked once where it points; where the Hub cannot be
    reached, the commit it pointed to last is taken from the cache.

    Args:
        repo: `owner/name`.
        files: names of the files, perhaps in folders of it, as `folder/name`.
        revision: branch, tag or commit of 40 hexadecimal digits; None is "main".
        cache_dir: folder of the Hub's cache.
        token: Hub token; None takes the one that is logged in.
        local_files_only: do not use the network.
        force_download: download again what the cache has.

    Raises:
        ValueError: for a revision that is no name of one.
        FileNotFoundError: for a repository, revision or file that is not there, or not in the cache with `local_files_only`.
        PermissionError: where the Hub wants another token.
        ConnectionError: for a Hub that cannot be reached, or goes away in the middle.
        OSError: for other answers, and for a file that is not what the Hub said it is.
    """
    revision = _checked_revision(repo, revision)
    if force_download and local_files_only:
        raise ValueError("force_download=True needs the network that local_files_only=True forbids; give one of them")
    cache_dir = local_path(cache_dir) if cache_dir else None
    cached = _cached(repo, files, revision, cache_dir)
    if cached is None and local_files_only:
        raise FileNotFoundError(f"{repo!r} at {revision!r} is not in the cache, and local_files_only=True asks nobody")
    if cached and not force_download and (local_files_only or cached.name == revision):
        return cached
    commit = _ask_commit(repo, files[0], revision, token, cached.name if cached and not force_download else None)
    folder = None if force_download else _cached(repo, files, commit, cache_dir)
    if folder is None:
        paths = [_download(repo, name, commit, cache_dir, token, force_download) for name in files]
        folder = _snapshot(paths[0], files[0])
    if commit != revision:
        _point(folder, revision)
    return folder


def describe(repo: str, name: str, *, revision: str, token: str | bool | None = None) -> tuple[Weights, int]:
    """The header and the size in bytes of a safetensors file on the Hub, without downloading its tensors.

    Raises:
        OSError: as `fetch`.
        ValueError: for a file that is no safetensors file.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, name, revision=revision)
    size = _call(lambda: get_hf_file_metadata(url, token=token).size, repo, revision)
    parse = HfApi(token=token).parse_safetensors_file_metadata
    try:
        header = _call(lambda: parse(repo, name, revision=revision), repo, revision)
        tensors = on_meta({key: (str(tensor.dtype), tensor.shape) for key, tensor in header.tensors.items()})
        if not isinstance(metadata := header.metadata or {}, dict):
            raise ValueError(f"its metadata is a {type(metadata).__name__}")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} of {repo!r} is no safetensors file, or a damaged one: {error}") from error
    return Weights(tensors, metadata), size or 0


def push(
    folder: Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a U-Net with unetlib",
    token: str | bool | None = None,
    keep: Sequence[str] = (),
) -> str:
    """Upload the files of a folder in one commit, and make the repository where there is none.

    Args:
        folder: what to upload.
        repo: `owner/name`.
        revision: branch to commit to; None is "main".
        private: whether a new repository is private; None takes the owner's default.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: title of the commit.
        token: Hub token with the right to write; None takes the one that is logged in.
        keep: names of files that stay as they are where the repository has them.

    Returns:
        The address of the pull request or commit.

    Raises:
        ValueError: for a `repo` that is not `owner/name`.
        OSError: as `fetch`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    target = _checked_revision(repo, revision)
    api = HfApi(token=token, library_name="unetlib", library_version=installed_version())
    _call(lambda: api.create_repo(repo, private=private, exist_ok=True), repo, target)
    kept = [name for name in keep if _call(partial(api.file_exists, repo, name, revision=revision), repo, target)]
    added = [CommitOperationAdd(path.name, str(path)) for path in sorted(folder.iterdir()) if path.name not in kept]
    commit: dict[str, Any] = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
    done = _call(lambda: api.create_commit(repo, added, **commit), repo, target, retries=())
    return str(done.pr_url or done.commit_url)


def _checked_revision(repo: str, revision: str | None) -> str:
    if not is_repository(repo):
        ending = ", of another ending than a weights file's" if is_weights_name(repo) else ""
        raise ValueError(f"expected a repository 'owner/name' on the Hugging Face Hub{ending}, got {repo!r}")
    if revision is not None and not (_REVISION.fullmatch(revision) and ".." not in revision):
        raise ValueError(f"revision must be a branch, a tag or a commit, such as 'main', got {revision!r}")
    return revision or "main"


def _cached(repo: str, files: Sequence[str], revision: str, cache_dir: Path | None) -> Path | None:
    """The folder of the commit that a revision pointed to when it was last fetched, if all its files are there."""
    from huggingface_hub import try_to_load_from_cache

    first = try_to_load_from_cache(repo, files[0], cache_dir, revision)
    folder = _snapshot(Path(first), files[0]) if isinstance(first, str) else None
    return folder if folder and all((folder / name).is_file() for name in files) else None


def _snapshot(path: Path, name: str) -> Path:
    """The folder of a commit, in which a file of this name, perhaps `folder/name`, lies at this path."""
    return path.parents[name.count("/")]


def _ask_commit(repo: str, name: str, revision: str, token: str | bool | None, cached: str | None) -> str:
    """The commit that a revision points to now, or the cached one where the Hub is silent."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, name, revision=revision)
    try:
        commit = _call(lambda: get_hf_file_metadata(url, token=token).commit_hash, repo, revision)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        if cached is None:
            raise
        logger.warning("%s; taking commit %s from the cache", error, cached[:8])
        return cached
    if commit is None or not _COMMIT.fullmatch(commit):
        raise OSError(f"the server that answers for {repo!r} names no commit; is it a Hugging Face Hub?")
    return str(commit)


def _download(
    repo: str, name: str, commit: str, cache_dir: Path | None, token: str | bool | None, force_download: bool
) -> Path:
    """The path in the cache of a file that has the hash by which the Hub calls it."""
    from huggingface_hub import hf_hub_download

    download = partial(
        hf_hub_download,
        repo,
        name,
        revision=commit,
        cache_dir=cache_dir,
        token=token,
        force_download=force_download,
        library_name="unetlib",
        library_version=installed_version(),
    )
    path = Path(_call(download, repo, commit))
    # The Hub's client checks the length alone. A blob is called by its hash; where the system has no links there is no blob,
    # and nothing to check against.
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    if len(blob.name) in (40, 64) and blob.name not in _hashes(blob, len(blob.name)):
        path.unlink()
        blob.unlink()
        raise OSError(f"{name} of {repo!r} arrived with another hash than the Hub gave for it, and was thrown away; try again")
    return path


def _hashes(path: Path, digits: int) -> set[str]:
    """The SHA-256, or git's SHA-1 and, as some mirrors give it, the plain one."""
    git = b"blob %d\0" % path.stat().st_size
    kinds = [hashlib.sha256()] if digits == 64 else [hashlib.sha1(start, usedforsecurity=False) for start in (git, b"")]
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            for kind in kinds:
                kind.update(chunk)
    return {kind.hexdigest() for kind in kinds}


def _point(folder: Path, revision: str) -> None:
    """Have a branch or tag of the cache point to the commit in this folder: refs/<branch> beside snapshots/<commit>."""
    ref = folder.parents[1] / "refs" / revision
    if ref.is_file() and ref.read_text(encoding="utf-8").strip() == folder.name:
        return  # a cache that only others may write serves too
    ref.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(ref) as written:
        written.write_text(folder.name, encoding="utf-8")


def _call(ask: Callable[[], Any], repo: str, revision: str, retries: Sequence[float] = RETRIES) -> Any:
    """Ask the Hub, again where it answers 500 and more, and tell one clear error of Python's own kinds."""
    waits = iter(retries)
    while True:
        try:
            return ask()
        except Exception as error:  # the client raises its own kinds and those of the HTTP library under it
            seconds = next(waits, None)
            if seconds is None or _status(error) < 500:
                raise _clear(error, repo, revision) from error
            logger.info("the Hugging Face Hub answers %d; asking again in %g s", _status(error), seconds)
            time.sleep(seconds)


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error, 0 where there was no answer."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return 0


def _clear(error: Exception, repo: str, revision: str) -> Exception:
    from huggingface_hub import errors

    there, status = f"{repo!r} on the Hugging Face Hub", _status(error)
    told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    log_in = "log in with `hf auth login` or pass token="
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{there} is gated: accept its terms on its page, then {log_in}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"there is no {there}, or it is private: check the name, and {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{there} has no revision {revision!r}: expected a branch, a tag or a commit")
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        name = str(getattr(error, "response").url).rpartition("/")[2]  # noqa: B009
        return FileNotFoundError(f"{there} has no {name} at {revision!r}, so it is no model folder that unetlib knows")
    if status in (401, 403):
        return PermissionError(f"the Hugging Face Hub refuses {repo!r} with status {status}: check the token, or {log_in}")
    if status:
        return OSError(f"the Hugging Face Hub answers {status} for {repo!r}: try again later ({told})")
    http = type(error).__module__.startswith(("httpx", "requests", "urllib3"))
    if not (http or isinstance(error, (OSError, RuntimeError))):  # the client stumbled over what came
        return ValueError(f"{repo!r} at {revision!r} is not what the Hub's client expects ({told})")
    if type(error) in (OSError, FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError):
        return OSError(f"{repo!r} could not be brought whole into the cache ({told})")
    return ConnectionError(f"the Hugging Face Hub cannot be reached for {repo!r} ({told})")
