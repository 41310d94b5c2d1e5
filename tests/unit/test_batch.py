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
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")

import pyarrow
from pack.internvl_u.batch import driver, jobs, lock, making, plan, rows, settings, storage, worker
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
        self.most = self.least = most

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

    def run(self, workers=1, worker=worker.Worker, pool=InTurns, **more):
        given = settings.BatchSettings(str(self.folder / "jobs.jsonl"), self.model, str(self.out), **more)

        @contextmanager
        def start(_):
            yield pool(workers)

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
    assert found["jobs.csv"][0][2] == {
        "prompt": 'a "cat", sitting',
        "width": 64,
        "seed": 5,
        "think": True,
        "all_cfg": 3.5,
    }


def test_the_same_command_makes_what_is_missing_broken_or_changed_and_nothing_else(batch, golden):
    shutil.copy(golden("edit_one").images[0], batch.folder / "seen.png")
    listed = [{"id": f"p{i}", "prompt": f"picture {i}", "seed": i, **SMALL} for i in range(6)]
    listed += [{"id": "edit", "prompt": "bluer", "image": "seen.png", "steps": 1, "reference_size": 64}]
    batch.write(listed)
    assert batch.run().made == 7
    before = batch.rows()
    again = batch.run()
    assert (again.made, again.kept, again.failed) == (0, 7, 0) and batch.rows() == before

    batch.file("p0").unlink()
    batch.file("p1").write_bytes(batch.file("p1").read_bytes()[:-1])
    listed[2]["seed"] = 77
    listed[3]["prompt"] = "another picture"
    batch.write(listed)
    assert made_now(batch) == {"p0", "p1", "p2", "p3"}
    assert batch.rows()["p0"]["sha256"] == before["p0"]["sha256"] != batch.rows()["p2"]["sha256"]

    os.utime(batch.folder / "seen.png")  # the time alone
    assert made_now(batch) == set()
    with Image.open(batch.folder / "seen.png") as seen:
        seen.convert("RGB").rotate(90).save(batch.folder / "seen.png")
    assert made_now(batch) == {"edit"}
    batch.write(listed[1:])
    assert made_now(batch) == set() and "p0" in batch.rows()
    assert batch.wrong(listed=False) == []


def made_now(batch, **more):
    before = {name: row["run"] for name, row in batch.rows().items()}
    batch.run(**more)
    return {name for name, row in batch.rows().items() if row["run"] != before.get(name)}


def test_what_has_changed_in_a_file_of_the_same_size_is_found_where_that_is_asked_for(batch):
    batch.write([{"id": name, "prompt": name, **SMALL} for name in "ab"])
    batch.run()
    data = bytearray(batch.file("a").read_bytes())
    data[-20] ^= 1
    batch.file("a").write_bytes(data)
    assert made_now(batch) == set() and len(batch.wrong()) == 1
    assert made_now(batch, verify=True) == {"a"} and batch.wrong() == []


def test_another_model_or_lora_makes_all_anew(batch, checkpoint, tmp_path):
    batch.write([{"id": "a", "prompt": "a", **SMALL}])
    batch.run()
    batch.model = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    assert made_now(batch) == set(), "the same model elsewhere"
    weights = max((batch.model / "vae").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1  # a mantissa's bit of the last weight
    weights.write_bytes(changed)
    assert made_now(batch) == {"a"}
    assert made_now(batch, dtype="bfloat16") == {"a"}


def test_jobs_that_are_alike_are_made_at_once_and_one_that_fails_does_so_alone(batch, near):
    listed = [{"id": f"p{i}", "prompt": "a cat " * (i + 1), "seed": i, **SMALL} for i in range(5)]
    listed[2]["prompt"] = "an <image> that is not there"
    listed.insert(1, {"id": "wide", "prompt": "wide", **SMALL, "width": 48})
    batch.write(listed)
    summary = batch.run(batch=3)
    assert (summary.made, summary.failed) == (5, 1)
    assert "1 <image> placeholders for 0 pictures" in batch.rows()["p2"]["error"]
    assert {name: row["together"] for name, row in batch.rows().items()} == {
        **{"p0": 1, "p1": 1, "p3": 2, "p4": 2, "wide": 1},  # p0 and p1 one by one, after p2 had failed
        "p2": None,
    }
    alone = Pipeline(batch.model)
    for name in ("p3", "p4"):
        (one,) = [one for one in listed if one["id"] == name]
        with Image.open(batch.file(name)) as drawn:
            pair = [
                torch.tensor(list(picture.tobytes())) for picture in (drawn, alone.draw(ImageRequest(**wanted(one))))
            ]
        assert (pair[0] - pair[1]).abs().max() <= 1
    assert batch.wrong() == []


def wanted(row):
    return {name: value for name, value in row.items() if name != "id"}


def test_pictures_whose_numbers_are_none_and_images_that_are_none_fail_with_their_reason(batch, monkeypatch):
    draw = making.draw_together

    def drawn(pipeline, requests):
        if any(request.seed == 13 for request in requests):
            raise RuntimeError("the drawn latent holds NaN")
        return draw(pipeline, requests)

    monkeypatch.setattr(making, "draw_together", drawn)
    (batch.folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    batch.write(
        [
            *({"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in (12, 13, 14)),
            {"id": "torn", "prompt": "a", "image": "torn.png", **SMALL},
        ]
    )
    summary = batch.run(batch=4)
    assert (summary.made, summary.failed) == (2, 2)
    assert dict(summary.errors)["p13"] == "the drawn latent holds NaN"
    assert "the image torn.png is not readable as a picture" in dict(summary.errors)["torn"]
    assert summary.trouble("M") == "2 of 4 jobs failed, see M; the others are made"
    assert batch.wrong() == []
    assert made_now(batch) == {"p13", "torn"}, "failures are tried again"


def test_the_first_failure_ends_a_run_that_is_to_fail_fast(batch):
    batch.write([*({"id": f"p{i}", "prompt": "a" if i else "<image>", **SMALL} for i in range(4))])
    summary = batch.run(fail_fast=True)
    assert (summary.made, summary.failed) == (0, 1)
    assert summary.trouble("M") == "ended with the first job that failed; 0 are made, see M"
    batch.write(["{"] + [json.dumps({"prompt": "a", **SMALL})])
    assert batch.run(fail_fast=True).made == 0


def test_a_full_disk_ends_the_run_with_one_sentence_and_the_next_one_goes_on(batch, monkeypatch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(5)])
    write, files = storage._write_local, []

    def full(file, data, lasting):
        if file.suffix == ".png":
            files.append(file)
            if len(files) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data, lasting)

    monkeypatch.setattr(storage, "_write_local", full)
    summary = batch.run()
    assert summary.made == 2 and len(files) == 3, "nothing is tried after it"
    assert "(No space left on device): make room there and run the same command again" in summary.trouble("")
    monkeypatch.undo()
    again = batch.run()
    assert (again.made, again.kept) == (3, 2) and batch.wrong() == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here: the test before this one stands for it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_leaves_nothing_half_written(batch, small_disk):
    batch.out = small_disk / "out"
    batch.write([{"id": f"p{i}", "prompt": f"a {'long ' * 50}", "seed": i, **SMALL} for i in range(12)])
    try:
        trouble = batch.run().trouble("")
    except OSError as error:  # the driver itself met it, when it gathered the manifest
        trouble = str(error)
    assert "(No space left on device" in trouble
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert 0 < batch.run().made < 12 and batch.wrong() == []


class WithoutModel(worker.Worker):
    """Workers of which the first one made has no model, for a while or for good."""

    made, fails = 0, 10**6

    def __init__(self, given):
        super().__init__(given)
        self.number = type(self).made
        type(self).made += 1

    def open(self):
        if self.number == 0 and self.fails:
            self.fails -= 1
            raise FileNotFoundError("no model here")
        return super().open()


def test_what_a_worker_without_the_model_is_given_goes_to_the_others(batch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(6)])
    kind = type("Gone", (WithoutModel,), {})
    summary = batch.run(workers=2, worker=kind)
    assert (summary.made, summary.failed, summary.not_made, summary.trouble("")) == (6, 0, 0, "")
    assert kind.made == 4, "two in the first pass, and two in the second"
    assert [line for line in batch.said if "3 jobs came back from workers without the model" in line]
    assert [line for line in summary.sentences("") if "no model here" in line]
    assert batch.wrong() == []


def test_a_model_that_comes_later_is_found(batch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(5)])
    summary = batch.run(workers=2, worker=type("Late", (WithoutModel,), {"fails": 2}))
    assert (summary.made, summary.not_made) == (5, 0)
    assert [line for line in batch.said if line.startswith("2 jobs came back from workers without the model")]


def test_without_a_model_anywhere_a_run_ends_soon_and_says_so(batch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(50)])
    kind = type("None", (WithoutModel,), {})
    summary = batch.run(worker=kind)
    assert (summary.made, summary.not_made, kind.made) == (0, 50, 1)
    assert "not made, no worker left that has the model" in summary.trouble("")


def test_a_worker_with_other_weights_than_the_drivers_makes_nothing(batch, checkpoint, tmp_path):
    given = worker.WorkerSettings(checkpoint, storage.Store.of(str(tmp_path)), storage.Store.of(str(tmp_path)))
    with pytest.raises(RuntimeError, match="that of the driver .* expected: copy the same files"):
        worker.Worker(given).open()
    pipeline = Pipeline(checkpoint)
    from dataclasses import replace

    opened = worker.Worker(replace(given, digest=given.found(pipeline), drawing=False)).open()
    assert set(opened._networks) == {"mllm"}


def test_a_job_that_ends_its_worker_again_and_again_is_given_up(batch, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    batch.write([{"id": "heavy", "prompt": "a", **SMALL}])

    class Restarted(worker.Worker):
        """Ray starts a worker that was killed again, with the same micro-batch."""

        def _report(self, number, missing):
            while True:
                try:
                    return super()._report(number, missing)
                except Killed:
                    killed.append(number)

    killed = []
    monkeypatch.setattr(making, "draw_together", kill)
    summary = batch.run(worker=Restarted)
    assert len(killed) == worker.MOST_ATTEMPTS and (summary.failed, summary.again) == (1, 1)
    assert "its worker was ended 3 times" in batch.rows()["heavy"]["error"] and batch.wrong() == []


def test_what_a_killed_run_has_written_is_kept(batch, monkeypatch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(6)])

    class Killed(BaseException):
        pass

    def leave(*_, **__):
        raise Killed

    shown = []

    def show(done, total):
        shown.append(done)
        if done == 3:
            raise Killed

    def killed_run():
        given = settings.BatchSettings(str(batch.folder / "jobs.jsonl"), batch.model, str(batch.out))

        @contextmanager
        def start(_):
            yield InTurns()

        driver.Run(given, start, batch.said.append, show).make()

    with pytest.raises(Killed):
        killed_run()
    assert len(list((batch.out / "manifest").iterdir())) == 3
    torn = sorted((batch.out / "manifest").iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:100])  # as a power cut may leave it
    (batch.out / "pictures" / "00").mkdir(exist_ok=True)
    (batch.out / "pictures" / "00" / ".p9.1.part").write_bytes(b"half a pict")
    summary = batch.run()
    assert (summary.made, summary.kept) == (4, 2) and batch.wrong() == []
    assert [line for line in batch.said if "cannot be read and counts as missing" in line]

    remove = storage.Store.remove

    def leave_parts(store, names):
        if names and names[0].startswith("manifest/"):
            raise Killed
        remove(store, names)

    for step, stopped in (("replace", leave), ("remove", leave_parts)):  # the two steps of gathering the parts
        batch.write([{"id": f"p{i}", "prompt": step, "seed": i, **SMALL} for i in range(6)])
        with monkeypatch.context() as patch:
            patch.setattr(storage.Store, step, stopped)
            with pytest.raises(Killed):
                batch.run()
        summary = batch.run()
        assert (summary.made, summary.kept) == (0, 6) and batch.wrong() == [], step


def test_a_micro_batch_that_was_written_before_its_worker_was_killed_is_not_made_again(batch, monkeypatch):
    batch.write([{"id": "a", "prompt": "a", **SMALL}])
    drawn = []
    draw = making.draw_together
    monkeypatch.setattr(making, "draw_together", lambda *given: drawn.append(1) or draw(*given))

    class Twice(worker.Worker):
        def _report(self, number, missing):
            first, again = super()._report(number, missing), super()._report(number, missing)
            assert first["made"] == again["made"] == 1
            return again

    assert batch.run(worker=Twice).made == 1 and len(drawn) == 1


def test_parts_are_made_one_while_a_run_goes_on(batch, monkeypatch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(9)])
    monkeypatch.setattr(driver, "MERGED", 4)
    there = []

    class Counting(worker.Worker):
        def _report(self, number, missing):
            there.append(len(list((batch.out / "manifest").glob("*"))))
            return super()._report(number, missing)

    assert batch.run(worker=Counting).made == 9 and batch.wrong() == []
    assert there == [0, 1, 2, 3, 1, 2, 3, 4, 2]


class AllAtOnce(InTurns):
    """One worker that is given all micro-batches in one block."""

    def run(self, worker, settings, batches):
        reports = worker(settings)({"number": list(range(batches))})
        yield from ({name: values[i] for name, values in reports.items()} for i in range(len(reports["made"])))


def test_the_files_of_a_micro_batch_are_written_while_the_next_one_is_drawn(batch, monkeypatch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(6)])
    write, draw = storage._write_local, making.draw_together
    begun, drawing = threading.Semaphore(0), threading.Lock()

    def written(file, data, lasting):
        if file.suffix == ".png" and file.stem != "p5":
            begun.acquire(timeout=60) or pytest.fail("no picture was begun while this one was to be written")
        write(file, data, lasting)

    def drawn(pipeline, wishes):
        if wishes[0].seed:
            begun.release()
        assert drawing.acquire(blocking=False), "one at a time"
        try:
            return draw(pipeline, wishes)
        finally:
            drawing.release()

    monkeypatch.setattr(storage, "_write_local", written)
    monkeypatch.setattr(making, "draw_together", drawn)
    assert batch.run(pool=AllAtOnce).made == 6 and batch.wrong() == []


def test_after_a_full_disk_a_worker_begins_nothing_more(batch, monkeypatch):
    batch.write([{"id": f"p{i}", "prompt": "a", "seed": i, **SMALL} for i in range(20)])
    write, draw, wishes = storage._write_local, making.draw_together, []

    def full(file, data, lasting):
        if file.suffix == ".png" and len(wishes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data, lasting)

    monkeypatch.setattr(storage, "_write_local", full)
    monkeypatch.setattr(making, "draw_together", lambda *given: wishes.append(1) or draw(*given))
    summary = batch.run(pool=AllAtOnce)
    assert len(wishes) <= 5 and "make room there" in summary.trouble("")
    monkeypatch.undo()
    assert batch.run(pool=AllAtOnce).kept == summary.made and batch.wrong() == []


def test_two_runs_never_write_into_one_folder(batch):
    batch.write([{"id": "a", "prompt": "a", **SMALL}])

    class Second(worker.Worker):
        def __init__(self, given):
            super().__init__(given)
            with pytest.raises(RuntimeError, match="is written into by another run, one at a time expected"):
                batch.run()

    assert batch.run(worker=Second).made == 1


def test_object_storage_is_kept_to_one_run_too_and_a_dead_ones_sign_does_not_stay(monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setattr(lock, "RENEWED", 0.2)
    out = storage.Store.of("memory://signs/out")
    with lock.locked(out):
        with pytest.raises(RuntimeError, match="is written into by another run"):
            with lock.locked(out):
                pass
        sign = out.read(lock.SIGN)
    assert out.states([lock.SIGN]) == [None]
    out.write(lock.SIGN, sign)  # of a run that was killed
    with lock.locked(out):
        assert out.read(lock.SIGN) != sign


def test_lists_images_and_results_may_be_in_object_storage(checkpoint, golden, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED", 0.2)
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    with memory.open("/bucket/lists/seen.png", "wb") as file:
        file.write(golden("edit_one").images[0].read_bytes())
    listed = [{"prompt": "a", **SMALL}, {"prompt": "b", "image": "seen.png", **SMALL, "reference_size": 64}]
    with memory.open("/bucket/lists/jobs.jsonl", "w") as file:
        file.write("\n".join(map(json.dumps, listed)))

    @contextmanager
    def start(_):
        yield InTurns()

    def run():
        given = settings.BatchSettings("memory://bucket/lists/jobs.jsonl", checkpoint, "memory://bucket/out")
        return driver.Run(given, start, print).make()

    assert (run().made, run().kept) == (2, 2)
    with memory.open("/bucket/out/manifest.parquet", "rb") as file:
        found = parquet.read_table(io.BytesIO(file.read())).to_pylist()
    for row in found:
        with memory.open(f"/bucket/out/{row['file']}", "rb") as file:
            assert hashlib.sha256(file.read()).hexdigest() == row["sha256"]
    assert len(memory.find("/bucket/out")) == 3


def test_the_plan_takes_no_more_memory_for_a_long_list(tmp_path, monkeypatch):
    """What is held at once is counted: jobs in groups that wait, and rows that are looked up."""
    listed = (jobs.Job(f"p{i}", i, jobs.PICTURE, {"prompt": "a", "steps": 1 + i % 300}) for i in range(30_000))
    held = most = 0

    def counted():
        nonlocal held, most
        for job in listed:
            held += 1
            most = max(most, held)
            yield job

    sizes = []
    for group in plan.grouped(counted(), 64):
        held -= len(group)
        sizes.append(len(group))
    assert sum(sizes) == 30_000 and most <= plan.MOST_WAITING + 1 and max(sizes) == 64


def test_without_ray_the_library_and_its_commands_work_and_batch_says_what_is_missing(tmp_path, checkpoint):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'pyarrow'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name in ('ray', 'pyarrow') else find(name, *more)\n"
        "from internvl_u.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    root = Path(check_manifest.__file__).parent.parent
    line = ["python", "-c", code]
    import sys

    line[0] = sys.executable
    drawn = [
        *line,
        "draw",
        "--model",
        str(checkpoint),
        "--prompt",
        "a",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
    ]
    done = subprocess.run([*drawn, "--out", str(tmp_path / "a.png")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*line, "batch", "jobs.jsonl", "--model", str(checkpoint), "--out", str(tmp_path / "out")],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "batch needs ray and pyarrow, which are not installed: pip install" in done.stderr
