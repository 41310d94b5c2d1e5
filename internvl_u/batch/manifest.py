"""What has been made of a list of jobs: a table of one row a job, its parts, and an index of both on a disk."""

from __future__ import annotations

import hashlib
import io
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from .storage import Store

MANIFEST, PARTS = "manifest.parquet", "manifest"
MADE, FAILED = "made", "failed"
SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("kind", pyarrow.string()),
        ("status", pyarrow.string()),
        ("error", pyarrow.string()),
        ("file", pyarrow.string()),
        ("sha256", pyarrow.string()),
        ("bytes", pyarrow.int64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("seed", pyarrow.decimal128(20, 0)),  # up to 2 ** 64, and below 0
        ("settings", pyarrow.string()),
        ("inputs", pyarrow.string()),
        ("digest", pyarrow.string()),
        ("model", pyarrow.string()),
        ("version", pyarrow.string()),
        ("worker", pyarrow.string()),
        ("together", pyarrow.int32()),
        ("seconds", pyarrow.float64()),
        ("started", pyarrow.timestamp("ms", "UTC")),
        ("text", pyarrow.string()),
        ("notes", pyarrow.string()),
        ("row", pyarrow.int64()),
        ("run", pyarrow.int64()),
    ]
)
_AT_ONCE = 1024
_READERS = 16
_INDEXED = ("name", "status", "digest", "file", "bytes", "sha256", "inputs", "run")


class Entry(NamedTuple):
    """What the index knows of a job; `source` is the number of the file that its row stands in."""

    status: str
    digest: str
    file: str
    bytes: int
    sha256: str
    inputs: str
    run: int
    source: int


def part_name(digest: str) -> str:
    """Returns the name of the part of a micro-batch."""
    return f"{PARTS}/{digest}.parquet"


def write_part(store: Store, digest: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows of a micro-batch, whole or not at all.

    Raises:
        OSError: they could not be written.
    """
    packed = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], SCHEMA), packed)
    store.write(part_name(digest), packed.getvalue())


def read_part(store: Store, digest: str) -> list[dict[str, Any]] | None:
    """Returns the rows of a part; None where there is none that can be read."""
    try:
        return parquet.read_table(io.BytesIO(store.read(part_name(digest)))).to_pylist()
    except (OSError, pyarrow.ArrowInvalid):
        return None


def merge_parts(store: Store, digests: Sequence[str]) -> None:
    """Makes one part of several: a million small files would take longer to read than they took to write.

    Raises:
        OSError: it could not be written; everything is as it was.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        rows = [row for some in readers.map(lambda digest: read_part(store, digest), digests) for row in some or ()]
        write_part(store, hashlib.sha256("".join(digests).encode()).hexdigest(), rows)
        list(readers.map(lambda digest: store.remove([part_name(digest)]), digests))


class Manifest:
    """The table and its parts in a folder of results, as they were when it was opened, with an index in a file."""

    def __init__(self, store: Store):
        self.store = store
        self._folder = tempfile.TemporaryDirectory(prefix="internvl_u_")
        self._index = sqlite3.Connection(f"{self._folder.name}/index.sqlite", isolation_level=None)
        self._index.execute("PRAGMA journal_mode = OFF")
        self._index.execute("PRAGMA synchronous = OFF")
        self._index.execute("PRAGMA cache_size = -16384")  # KiB
        columns = ", ".join([*_INDEXED, "source"])
        self._index.execute(f"CREATE TABLE made ({columns}, PRIMARY KEY (name)) WITHOUT ROWID")
        self._index.execute("CREATE TABLE seen (name PRIMARY KEY) WITHOUT ROWID")
        self.sources = [MANIFEST, *(f"{PARTS}/{name}" for name in store.names(PARTS) if name.endswith(".parquet"))]
        self.broken: list[str] = []
        self.last_run = 0
        for number in range(len(self.sources)):
            self._add(number)

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self._index.close()
        self._folder.cleanup()

    def find(self, names: Sequence[str]) -> dict[str, Entry]:
        """Returns what is known of jobs, by their names."""
        marks = ", ".join("?" * len(names))
        found = self._index.execute(f"SELECT * FROM made WHERE name IN ({marks})", list(names))
        return {name: Entry(*rest) for name, *rest in found}

    def first_time(self, name: str) -> bool:
        """Returns whether a name has not been asked for before."""
        return self._index.execute("INSERT OR IGNORE INTO seen VALUES (?)", [name]).rowcount == 1

    def compact(self, run: int) -> None:
        """Makes one table of the parts, without rows that newer ones replace and failures of earlier runs.

        Raises:
            OSError: it could not be written; everything is as it was.
        """
        new = f"{MANIFEST}.part"
        with self.store.filesystem.open_output_stream(self.store.path(new)) as target:
            with parquet.ParquetWriter(target, SCHEMA) as writer:
                for table in self._rows_to_keep(run):
                    writer.write_table(table)
        self.store.replace(new, MANIFEST)
        self.store.remove(self.sources[1:])

    def _add(self, source: int) -> None:
        changes = "ON CONFLICT (name) DO UPDATE SET " + ", ".join(
            f"{name} = excluded.{name}" for name in (*_INDEXED[1:], "source")
        )
        line = f"INSERT INTO made VALUES ({', '.join('?' * (len(_INDEXED) + 1))}) {changes} WHERE excluded.run >= run"
        for batch in self._batches(source, _INDEXED):
            rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            self._index.execute("BEGIN")
            for row in rows:
                self._index.execute(line, [*row, source])
                self.last_run = max(self.last_run, row[-1])
            self._index.execute("COMMIT")

    def _batches(self, source: int, columns: Sequence[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
        """Yields what a file of the manifest holds; one that cannot be read, as after a power cut, holds nothing."""
        name = self.sources[source]
        try:
            with self.store.filesystem.open_input_file(self.store.path(name)) as opened:
                yield from parquet.ParquetFile(opened).iter_batches(_AT_ONCE, columns=columns)
        except FileNotFoundError:
            return
        except pyarrow.ArrowInvalid:
            if name not in self.broken:
                self.broken.append(name)

    def _rows_to_keep(self, run: int) -> Iterator[pyarrow.Table]:
        """Yields the newest rows, gathered so that the table has few groups of rows."""
        waiting: list[pyarrow.RecordBatch] = []
        for source in range(len(self.sources)):
            for batch in self._batches(source):
                known = self.find(batch["name"].to_pylist())
                kept = [
                    (entry := known[name]).source == source and (entry.status == MADE or entry.run == run)
                    for name in batch["name"].to_pylist()
                ]
                waiting.append(batch.filter(pyarrow.array(kept)))
                if sum(one.num_rows for one in waiting) >= 8 * _AT_ONCE:
                    yield pyarrow.Table.from_batches(waiting, SCHEMA)
                    waiting = []
        yield pyarrow.Table.from_batches(waiting, SCHEMA)
