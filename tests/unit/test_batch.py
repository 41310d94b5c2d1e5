"""Lists of jobs: what a row may say, what is made and kept, and what happens when something is missing or breaks.

Workers run in this process, one after the other; tests/unit/test_batch_ray.py has the real ones.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")

import pyarrow
from pack.internvl_u.batch import command, driver, jobs, making, manifest, plan, rows, settings, storage, worker
from pack.internvl_u.picture_texts import picture_texts
from pack.internvl_u.pipeline import Pipeline
from pack.internvl_u.request import ImageRequest
from pack.tools import check_manifest
from pyarrow import parquet

SMALL = {"width": 32, "height": 32, "steps": 1}


class InTurns:
    """Workers that are given micro-batches in turns."""

    threads = 1

    def __init__(self, most=1):
        self.most = most

    def run(self, worker, settings, batches):
        workers = [worker(settings) for _ in range(self.most)]
        for number in range(batches):
            report = workers[number % self.most]({"number": [number]})
            yield {name: value for name, (value,) in report.items()}


class Batch:
    """A list and a folder of results in a temporary folder."""

    def __init__(self, folder, model):
        self.folder, self.model, self.out = folder, model, folder / "out"
        self.said = []

    def write(self, listed, name="jobs.jsonl"):
        text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in listed)
        (self.folder / name).write_text(text, encoding="utf-8")

    def run(self, workers=1, worker=worker.Worker, **more):
        given = settings.BatchSettings(str(self.folder / "jobs.jsonl"), self.model, str(self.out), **more)

        @contextmanager
        def start(_):
            yield InTurns(workers)

        made = driver.Run(given, start, self.said.append, worker=worker, pause=0.0).make()
        return made

    def rows(self):
        return {row["name"]: row for row in parquet.read_table(self.out / "manifest.parquet").to_pylist()}

    def file(self, name):
        return self.out / self.rows()[name]["file"]

    def wrong(self, listed=True):
        return list(check_manifest.wrong(self.out, self.folder / "jobs.jsonl" if listed else None))


@pytest.fixture
def batch(tmp_path, checkpoint):
    return Batch(tmp_path, checkpoint)


@pytest.fixture
def mixed(batch, golden):
    """Pictures from words, of an edit and after a thought, and texts; two rows are broken, one has no image."""
    shutil.copy(golden("edit_one").images[0], batch.folder / "seen.png")
    batch.write(
        [
            {"id": "words", "prompt": "a red circle", "seed": 7, **SMALL},
            {"id": "edit", "prompt": "make it blue", "image": "seen.png", "steps": 1, "seed": -3, "reference_size": 64},
            {"id": "thinks", "prompt": "two cats", "think": True, "max_new_tokens": 6, **SMALL},
            {"id": "thought", "prompt": "two cats", "thought": "A thought.", **SMALL},
            {"id": "asked", "question": "What is it?", "images": ["seen.png"], "max_new_tokens": 4},
            {"id": "task", "task": "caption", "image": "seen.png", "max_new_tokens": 4},
            "{broken",
            {"prompt": "no such image", "image": "none.png", **SMALL},
            {"id": "words", "prompt": "a name that was there", **SMALL},
        ]
    )
    return batch


def test_pictures_and_texts_are_those_that_are_made_alone(mixed, checkpoint):
    summary = mixed.run()
    assert (summary.made, summary.kept, summary.failed) == (6, 0, 3)
    rows, alone = mixed.rows(), Pipeline(checkpoint)
    for name, request, images in (
        ("words", ImageRequest("a red circle", seed=7, **SMALL), []),
        ("thought", ImageRequest("two cats", thought="A thought.", **SMALL), []),
    ):
        packed = io.BytesIO()
        alone.draw(request).save(packed, format="PNG", pnginfo=picture_texts(alone, request, images, checkpoint))
        assert mixed.file(name).read_bytes() == packed.getvalue()
    with Image.open(mixed.folder / "seen.png") as seen:
        images = (seen.convert("RGB"),)
    edited = alone.draw(ImageRequest("make it blue", images=images, steps=1, seed=-3, reference_size=64))
    with Image.open(mixed.file("edit")) as drawn:
        assert drawn.tobytes() == edited.tobytes() and json.loads(drawn.text["internvl_u"])["images"] == ["seen.png"]
    config = jobs.read_job(rows_of({"question": "x", "max_new_tokens": 4})).config
    assert rows["asked"]["text"] == alone.answer("What is it?", images, config=config)
    assert mixed.file("asked").read_text(encoding="utf-8") == rows["asked"]["text"] + "\n"
    assert rows["thinks"]["text"] and int(rows["edit"]["seed"]) == -3
    assert rows["words"]["digest"] and rows["words"]["together"] == 1 and rows["words"]["seconds"] > 0
    assert mixed.wrong() == []


def test_a_row_that_is_no_job_is_a_failure_with_a_sentence_and_keeps_no_other_from_being_made(mixed):
    mixed.run()
    failed = {name: row["error"] for name, row in mixed.rows().items() if row["status"] == "failed"}
    assert "row 7: no JSON found" in failed["#7"] and "expected" in failed["#7"]
    assert "row 9: id words found in an earlier row too, another one expected" in failed["#9"]
    assert "the image none.png cannot be read" in failed["row-00000008"]


def rows_of(cells, loose=False):
    return rows.Row(1, cells, "", loose)


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({}, "neither prompt nor question found, but nothing"),
        ({"text": "a cat"}, "neither prompt nor question found, but text"),
        ({"prompt": "a", "question": "b"}, "prompt and question found, one of them expected"),
        ({"prompt": 3}, "prompt 3 found, a text expected"),
        ({"prompt": "a", "steps": "8"}, "steps '8' found, a whole number expected"),
        ({"prompt": "a", "steps": 0}, "steps 0 found, 1 to"),
        ({"prompt": "a", "steps": True}, "steps True found"),
        ({"prompt": "a", "width": 5000}, "width 5000 found, 16 to 4096 pixels expected"),
        ({"prompt": "a", "seed": 2**64}, "seed .* found"),
        ({"prompt": "a", "all_cfg": float("inf")}, "all_cfg inf found, a number expected"),
        ({"prompt": "a", "speed": "warp"}, "speed 'warp' found, one of quality"),
        ({"prompt": "a", "reference_size": 3}, "reference_size 3 found"),
        ({"prompt": "a", "think": True, "thought": "b"}, "think and thought found, one of them expected"),
        ({"prompt": "a", "think": "maybe"}, "think 'maybe' found, true or false expected"),
        ({"prompt": "a", "beams": 2}, "beams found in the row of a picture, none expected"),
        ({"question": "a", "steps": 2}, "steps found in the row of a text, none expected"),
        ({"question": "a", "beams": 0}, "beams 0 found, 1 to"),
        ({"task": "dance"}, "task 'dance' found, one of as written"),
        ({"prompt": "a", "id": "../a"}, "id '../a' found, one without '/' expected"),
        ({"prompt": "a", "id": ".a"}, "id '.a' found, one that begins with neither"),
        ({"prompt": "a", "id": "a" * 121}, "an id of 121 bytes found, 120 expected at most"),
        ({"prompt": "a", "id": 1.5}, "id 1.5 found, a text expected"),
        ({"prompt": "a", "id": "b", "name": "c"}, "id and name found, one of them expected"),
        ({"prompt": "a", "image": 3}, "images with 3 found, names of files expected"),
        ({"prompt": "a", "image": "[1"}, r"images '\[1' found, a list such as"),
        ({"prompt": "a", "images": ["b"] * 65}, "65 images found, 64 expected at most"),
        ({"prompt": "\ud800"}, "half a character"),
    ],
)
def test_what_a_row_may_not_say_is_named(cells, sentence):
    with pytest.raises(ValueError, match=sentence):
        jobs.read_job(rows_of(cells))


def test_the_same_list_in_three_formats_has_the_same_jobs(tmp_path):
    listed = [
        {"id": "a", "prompt": 'a "cat", sitting', "width": 64, "seed": 5, "think": True, "all_cfg": 3.5},
        {"id": "b", "question": "What?\nAnd why?", "images": ["x.png", "y.png"], "max_new_tokens": 9},
        {"id": "c", "prompt": "ein Kätzchen", "image": "x.png"},
    ]
    text = "".join(json.dumps(one) + "\n" for one in listed)
    (tmp_path / "jobs.jsonl").write_text(text)
    columns = list(dict.fromkeys(name for one in listed for name in one))
    with (tmp_path / "jobs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        import csv

        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for one in listed:
            packed = {name: json.dumps(value) if isinstance(value, list) else value for name, value in one.items()}
            writer.writerow(packed)
    columns = {name: [one.get(name) for one in listed] for name in columns}
    parquet.write_table(pyarrow.table(columns), tmp_path / "jobs.parquet")
    import gzip

    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = {}
    for name in ("jobs.jsonl", "jobs.csv", "jobs.parquet", "more.jsonl.gz"):
        read = [jobs.read_job(row) for row in rows.read_rows(storage.Store.of(str(tmp_path / name)))]
        found[name] = [(job.name, job.kind, job.settings, job.images) for job in read]
    assert len({json.dumps(one) for one in found.values()}) == 1, found
    assert found["jobs.csv"][0][2] == {"prompt": 'a "cat", sitting', "width": 64, "seed": 5, "think": True, "all_cfg": 3.5}
