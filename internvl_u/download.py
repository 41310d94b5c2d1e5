"""The model from Hugging Face, a mirror of it, or ModelScope: whole and checked, or not at all.

Until all is there, the files lie in a hidden folder beside the target: `parts` by their hash, so that the next attempt
goes on with them, from whichever source; `files` what is whole. Only files that are read here are taken, under names
that are checked; the target gets its name by one renaming.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import transfer
from .defaults import FOLDERS, MODELSCOPE_REPOSITORY, PARTS, REPOSITORY
from .files import digest_of, shown
from .schema import Section, checked, parse

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

SOURCES = ("huggingface", "modelscope")
MODELSCOPE = "https://modelscope.cn"
_WANTED = ("*.safetensors", "*.json", "merges.txt")
_WANTED_ON_TOP = ("model_index.json", "LICENSE*", "README.md")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_DIGESTS = {"sha256": re.compile("[0-9a-f]{64}"), "git": re.compile("[0-9a-f]{40}")}

Progress = Callable[[int, int], object]
"""Called with the bytes that are there and the bytes of all files, 0 while they are not known; may raise to end it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes, and its hash, SHA-256 ("sha256") or git's own ("git")."""

    path: str
    size: int
    algorithm: str
    digest: str
    url: str


@dataclass(frozen=True)
class Listing:
    """What a repository has that we want, and what is sent along when it is asked for."""

    files: tuple[RemoteFile, ...]
    headers: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class _ModelScopeFile(Section):
    Path: str
    Type: str
    Size: int = 0
    Sha256: str = ""


class _ModelScopeFiles(Section):
    Files: list[_ModelScopeFile] | None = None


class _ModelScopeAnswer(Section):
    Data: _ModelScopeFiles | None = None


def download(
    target: Path, source: str = SOURCES[0], revision: str | None = None, progress: Progress = lambda done, total: None
) -> None:
    """Downloads the model into the folder `target`, which is not there yet. It can be repeated after any interruption.

    `source` is one of `SOURCES` or the URL of a mirror of Hugging Face; `revision` a branch, tag or commit.

    Raises:
        ValueError: source or revision are none.
        FileExistsError: the target is there already.
        RuntimeError: the source does not have it, sends something else, or does not answer; another download is at it.
        OSError: there is too little space, or nothing can be written there.
    """
    target = Path(os.path.abspath(target))
    _check_free(target)
    listing = list_files(source, revision, lambda: progress(0, 0))
    work = target.with_name(f".{target.name}.download")
    with _locked(work), _resumable(work):
        _check_free(target)
        _check_space(work, listing)
        done = 0
        for file in listing.files:
            _take(file, listing.headers, work, lambda there, before=done: progress(before + there, listing.size))
            done += file.size
        _give_name(work / "files", listing, target)
        shutil.rmtree(work / "parts")


def list_files(source: str, revision: str | None, pause: Callable[[], object]) -> Listing:
    """Returns the files of a source that we want. `pause` is called while it waits, and may raise to end that.

    Raises:
        ValueError: source or revision are none.
        RuntimeError: the source has no whole model, or does not answer.
    """
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ValueError(f"revision {revision[:100]!r} found, a branch, a tag or a commit expected")
    if source == "modelscope":
        listing = _list_modelscope(revision or "master", pause)
    elif source == "huggingface":
        listing = _list_hub(None, revision, pause)
    elif re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._/-]*)?", source):
        listing = _list_hub(source.rstrip("/"), revision, pause)
    else:
        raise ValueError(f"source {source[:100]!r} found, {', '.join(SOURCES)} or the URL of a mirror expected")
    _check_listing(listing, source)
    return listing


def is_wanted(path: str) -> bool:
    """Returns whether a file of a repository is taken, by its path there; no other name ever gets to the disk."""
    *folders, name = path.split("/")
    if not folders:
        wanted = _WANTED_ON_TOP
    else:
        wanted = _WANTED if len(folders) == 1 and folders[0] in FOLDERS else ()
    return bool(_NAME.fullmatch(name)) and any(fnmatchcase(name, pattern) for pattern in wanted)


def _list_hub(endpoint: str | None, revision: str | None, pause: Callable[[], object]) -> Listing:
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    token = None if endpoint is None else False  # the user's login is for Hugging Face, not for mirrors
    place = f"{endpoint or constants.ENDPOINT}/{REPOSITORY}"

    def ask() -> ModelInfo:
        with transfer.translated(place):
            return HfApi(endpoint, token=token).model_info(
                REPOSITORY, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )

    info = transfer.patiently(ask, pause)
    files = []
    for file in info.siblings or ():
        if is_wanted(file.rfilename):
            url = hf_hub_url(REPOSITORY, file.rfilename, revision=info.sha or revision, endpoint=endpoint)
            kind, digest = ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id)
            files.append(_remote(file.rfilename, file.size, kind, digest, url))
    return Listing(tuple(files), build_hf_headers(token=token))


def _list_modelscope(revision: str, pause: Callable[[], object]) -> Listing:
    from huggingface_hub import hf_hub_url

    api = f"{MODELSCOPE}/api/v1/models/{MODELSCOPE_REPOSITORY}/repo/files?Revision={revision}&Recursive=true"
    answer = checked(_ModelScopeAnswer, parse(transfer.read(api, pause), api), api)
    found = (answer.Data.Files if answer.Data else None) or []  # none for a revision that is not there
    # The addresses of files have the form of Hugging Face's.
    url = partial(hf_hub_url, MODELSCOPE_REPOSITORY, revision=revision, endpoint=f"{MODELSCOPE}/models")
    wanted = [file for file in found if file.Type != "tree" and is_wanted(file.Path)]
    return Listing(tuple(_remote(file.Path, file.Size, "sha256", file.Sha256, url(file.Path)) for file in wanted), {})


def _remote(path: str, size: object, algorithm: str, digest: object, url: str) -> RemoteFile:
    if not (isinstance(size, int) and size >= 0 and isinstance(digest, str) and _DIGESTS[algorithm].fullmatch(digest)):
        raise RuntimeError(f"{url} is listed with the size {shown(size)} and the hash {shown(digest)}: both expected")
    return RemoteFile(path, size, algorithm, digest, url)


def _check_listing(listing: Listing, source: str) -> None:
    paths = {file.path for file in listing.files}
    missing = [f"{part}/config.json" for part in PARTS if f"{part}/config.json" not in paths]
    missing += [
        f"{part}/*.safetensors" for part in PARTS if not any(fnmatchcase(p, f"{part}/*.safetensors") for p in paths)
    ]
    if missing:
        raise RuntimeError(
            f"{source} has no {', '.join(missing)} ({len(paths)} files of a model found): look at the revision, or "
            "take another source"
        )


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(
            f"{target} is there already and is left as it is: use it, rename it, or name another folder"
        )


def _check_space(work: Path, listing: Listing) -> None:
    needed, free = listing.size, shutil.disk_usage(work).free
    for file in listing.files:
        places = (work / "files" / file.path, work / "parts" / file.digest)
        needed -= min(file.size, sum(place.stat().st_size for place in places if place.is_file()))
    if needed > free:
        raise OSError(
            f"{free / 1e9:.1f} GB free in {work.parent}, {needed / 1e9:.1f} GB needed: make room, or name another "
            "folder"
        )


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps other downloads, in this process or another, out of a folder; leaves none where there is nothing to keep.

    Raises:
        RuntimeError: another one is at it. OSError: the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        for name in ("parts", "files"):
            (work / name).mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(work / "lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"another download is at work in {work}: wait for it, or end it") from None
    except OSError as error:
        why = f"{work} cannot be made ({error.strerror or error})"
        raise OSError(f"{why}: change its rights, or name another folder") from error
    try:
        yield
    finally:
        kept = any(file.is_file() for name in ("parts", "files") for file in (work / name).rglob("*"))
        lock.release()
        if not kept:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _resumable(work: Path) -> Iterator[None]:
    """Tells, where a download ends before its end, that it can go on."""
    advice = f"What was fetched is kept in {work}; the same once more goes on from there"
    try:
        yield
    except transfer.Unavailable as error:
        raise RuntimeError(f"{error}. {advice}") from error
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"nothing can be written to {work} ({error.strerror}). {advice}") from error


def _take(file: RemoteFile, headers: dict[str, str], work: Path, report: Callable[[int], object]) -> None:
    """Has a file in `files`, whole and checked."""
    place, part = work / "files" / file.path, work / "parts" / file.digest
    if place.is_file():
        if digest_of(place, file.algorithm, lambda: report(0)) == file.digest:
            return
        place.unlink()
    transfer.fetch(file.url, headers, part, file.size, report)
    found = digest_of(part, file.algorithm, lambda: report(file.size))
    if found != file.digest:
        part.unlink()
        raise RuntimeError(
            f"{file.url} has the hash {found}, {file.digest} expected by its list: it was damaged on the way and is "
            "not taken. Run again, or take another source"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, place)


def _give_name(files: Path, listing: Listing, target: Path) -> None:
    wanted = {files / file.path for file in listing.files}
    for file in files.rglob("*"):
        if file.is_file() and file not in wanted:  # of another revision
            file.unlink()
    _check_free(target)
    os.rename(files, target)
