"""Folders on a disk or in object storage, and files in them that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow import fs as arrow_fs

from ..files import in_short

_PUT_IS_WHOLE = ("s3", "gcs", "abfs")
"""Object storage: what is written there appears when it is whole."""
_UNFINISHED = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Store:
    """A folder: a file system of Arrow, and the folder's path in it. Names in it have slashes."""

    filesystem: Any
    root: str

    @classmethod
    def of(cls, place: str) -> Store:
        """Returns the folder, or the file, of a path or a URI such as s3://bucket/folder.

        Raises:
            ValueError: there is no such kind of storage.
        """
        if "://" not in place:
            return cls(arrow_fs.LocalFileSystem(), os.path.abspath(place))
        try:
            return cls(*arrow_fs.FileSystem.from_uri(place))
        except (ArrowException, ValueError) as error:
            return cls(*_of_fsspec(place, error))

    @property
    def local(self) -> bool:
        """Whether it is on a disk of this machine, or mounted like one."""
        return isinstance(self.filesystem, arrow_fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Returns the path of a file in the file system."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def beside(self) -> Store:
        """Returns the folder that a file is in."""
        return Store(self.filesystem, self.root.replace("\\", "/").rpartition("/")[0] or "/")

    def elsewhere(self, name: str) -> tuple[Store, str]:
        """Returns the folder and the name of what is named in it: by a URI, by a whole path, or from here on."""
        if "://" in name:
            return Store.of(name), ""
        return (Store.of(name), "") if os.path.isabs(name) else (self, name)

    def read(self, name: str) -> bytes:
        """Returns what a file holds.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        with self.filesystem.open_input_file(self.path(name)) as file:
            return file.read()

    def states(self, names: Sequence[str]) -> list[tuple[int, int] | None]:
        """Returns the size in bytes and the time of change in ns of files; None of those that are not there."""
        if not names:
            return []
        infos = self.filesystem.get_file_info([self.path(name) for name in names])
        return [(one.size, one.mtime_ns or 0) if one.type == arrow_fs.FileType.File else None for one in infos]

    def names(self, folder: str) -> list[str]:
        """Returns the names of the files that lie in a folder itself, without it; of none where it is not there."""
        selector = arrow_fs.FileSelector(self.path(folder), allow_not_found=True)
        found = [one for one in self.filesystem.get_file_info(selector) if one.type == arrow_fs.FileType.File]
        return sorted(one.base_name for one in found)

    def write(self, name: str, data: bytes, lasting: bool = True) -> None:
        """Writes a file, whole or not at all; without `lasting` a power cut may take it away again.

        Raises:
            OSError: it could not be written.
        """
        if self.local:
            _write_local(Path(self.path(name)), data, lasting)
        elif self.filesystem.type_name in _PUT_IS_WHOLE:
            self._put(self.path(name), data)
        else:
            target = self.path(name)
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            self._put(f"{target}{_UNFINISHED}", data)
            self.filesystem.move(f"{target}{_UNFINISHED}", target)

    def replace(self, source: str, target: str) -> None:
        """Gives a file the name of another, which it replaces."""
        self.filesystem.move(self.path(source), self.path(target))

    def make_folder(self, name: str) -> None:
        """Makes a folder, where folders have to be made."""
        if self.filesystem.type_name not in _PUT_IS_WHOLE:
            self.filesystem.create_dir(self.path(name), recursive=True)

    def remove(self, names: Iterator[str] | Sequence[str]) -> None:
        """Removes files; those that are not there are none."""
        for name in names:
            try:
                self.filesystem.delete_file(self.path(name))
            except FileNotFoundError:
                continue

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it, if it is there."""
        try:
            self.filesystem.delete_dir(self.path(name))
        except FileNotFoundError:
            return

    def has_folder(self, name: str) -> bool:
        """Returns whether there is a folder of this name."""
        return self.filesystem.get_file_info(self.path(name)).type == arrow_fs.FileType.Directory

    def remove_unfinished(self) -> None:
        """Removes what processes that were killed have begun to write in the folder, one level deep and two."""
        if self.local:
            for depth in ("*", "*/*"):
                for file in Path(self.root).glob(f"{depth}/.*{_UNFINISHED}"):
                    file.unlink(missing_ok=True)

    def _put(self, path: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(path) as file:
            file.write(data)


def nothing_more_fits(error: BaseException) -> bool:
    """Returns whether an error says that a disk takes nothing more: it is full, a quota is used up, or read-only."""
    return isinstance(error, OSError) and error.errno in _FULL


def cannot_write(who: str, out: Store, error: OSError) -> str:
    """Returns a sentence on why somebody cannot write into a folder, and what to do."""
    why = os.strerror(error.errno) if error.errno else in_short(error)
    if nothing_more_fits(error):
        remedy = "make room there and run the same command again, which goes on from here"
    else:
        remedy = "give a folder that every worker reaches and can write into"
    return f"{who} cannot write into {out.root} ({why}): {remedy}"


def _write_local(file: Path, data: bytes, lasting: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem[:40]}.{os.getpid()}{_UNFINISHED}")
    try:
        with partial.open("wb") as target:
            target.write(data)
            if lasting:
                target.flush()
                os.fsync(target.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _of_fsspec(place: str, why: Exception) -> tuple[Any, str]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{place} found, a path, or a URI that Arrow or fsspec knows, expected ({why}; {error})"
        ) from error
    return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(filesystem)), path
