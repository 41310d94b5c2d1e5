"""Lists of jobs made by real workers on Ray Data, which are killed in the middle, as is what drives them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("ray", reason="ray[data] is in requirements-dev.txt")

from pack.internvl_u.batch import ray_pool, settings
from pack.tools import check_manifest
from pyarrow import parquet

ROOT = Path(check_manifest.__file__).parent.parent
COUNT, PATIENCE = 500, 240


def listed():
    """500 jobs: pictures of two sizes, edits, thoughts, questions; three of them fail."""
    for i in range(COUNT):
        small = {"width": 32 + 16 * (i % 2), "height": 32, "steps": 1, "seed": i}
        if i % 50 == 10:
            yield {"id": f"e{i}", "prompt": "make the circle blue", "image": "seen.png", "steps": 1}
        elif i % 25 == 20:
            yield {"id": f"q{i}", "question": "Which shape is it?", "image": "seen.png", "max_new_tokens": 4}
        elif i % 50 == 30:
            yield {"id": f"t{i}", "prompt": "a red star", "think": True, "max_new_tokens": 4, **small}
        elif i == 41:
            yield {"id": f"p{i}", "prompt": "a red star", **small, "steps": -1}
        elif i == 42:
            yield {"id": f"p{i}", "prompt": "a red star", "image": "torn.png", **small}
        elif i == 43:
            yield {"id": f"p{i}", "prompt": "one <image> too many", **small}
        else:
            yield {"id": f"p{i}", "prompt": "a red star", **small}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    Image.new("RGB", (64, 64), "red").save(folder / "seen.png")
    (folder / "torn.png").write_bytes(b"torn")
    (folder / "jobs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in listed()))
    return folder


def begin(folder):
    line = [sys.executable, "-m", "internvl_u", "batch", folder / "jobs.jsonl", "--out", folder / "out"]
    line += ["--model", "nano", "--workers", "2", "--cpus", "0.5", "--batch", "4"]
    return subprocess.Popen([*map(str, line)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts(folder):
    return list((folder / "out" / "manifest").glob("*.parquet"))


def wait_for(running, done):
    end = time.monotonic() + PATIENCE
    while not done():
        assert running is None or running.poll() is None, running.communicate()
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def workers(folder):
    """The processes that have written parts of the manifest."""
    found = set()
    for part in parts(folder):
        names = parquet.read_table(part, columns=["worker"])["worker"].to_pylist()
        found |= {int(name.rpartition(":")[2]) for name in names if name}
    return found


def is_alive(process):
    try:
        status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_500_jobs_are_made_once_each_though_a_worker_and_the_driver_are_killed(folder):
    running = begin(folder)
    wait_for(running, lambda: len(parts(folder)) >= 25)
    started = workers(folder)
    running.kill()
    running.communicate()
    wait_for(None, lambda: not any(map(is_alive, started)))
    written = {file: file.stat().st_mtime_ns for file in (folder / "out").glob("pictures/*/*.png")}
    assert not (folder / "out" / "manifest.parquet").exists() and 50 < len(written) < COUNT

    running = begin(folder)
    wait_for(running, lambda: workers(folder) - started)
    os.kill(min(workers(folder) - started), signal.SIGKILL)
    told = running.communicate(timeout=PATIENCE)[1]
    assert running.returncode == 1, "three jobs are broken"
    assert f"internvl_u: 3 of {COUNT} jobs failed" in told and "; the others are made" in told
    rows = {row["name"]: row for row in parquet.read_table(folder / "out" / "manifest.parquet").to_pylist()}
    assert len(rows) == COUNT
    assert list(check_manifest.wrong(folder / "out", folder / "jobs.jsonl")) == []
    failed = {name: row["error"] for name, row in rows.items() if row["status"] == "failed"}
    assert set(failed) == {"p41", "p42", "p43"}
    assert "steps -1 found, 1 to" in failed["p41"] and "torn.png is not readable as a picture" in failed["p42"]
    assert max(row["together"] or 0 for row in rows.values()) == 4

    kept = [row["file"] for row in rows.values() if row["run"] == min(row["run"] for row in rows.values())]
    assert len(kept) > 50 and f"{len(kept)} kept" in told
    for file in kept:
        if file.endswith(".png"):
            assert written[folder / "out" / file] == (folder / "out" / file).stat().st_mtime_ns, "made twice"


@pytest.mark.parametrize(
    ("given", "found", "expected"),
    [
        ({}, {"CPU": 8.0}, (1, 1, 8.0, 0.0)),
        ({"workers": 4}, {"CPU": 8.0}, (4, 4, 2.0, 0.0)),
        ({"workers": 4, "least_workers": 1, "cpus": 0.5}, {"CPU": 2.0}, (1, 4, 0.5, 0.0)),
        ({}, {"CPU": 16.0, "GPU": 4.0}, (4, 4, 1.0, 1.0)),
        ({"gpus": 0.5}, {"CPU": 16.0, "GPU": 2.0}, (4, 4, 1.0, 0.5)),
        ({"device": "cpu", "workers": 2}, {"CPU": 16.0, "GPU": 2.0}, (2, 2, 8.0, 0.0)),
    ],
)
def test_workers_are_as_many_as_there_is_room_for(given, found, expected):
    pool = ray_pool.sized(settings.BatchSettings("jobs", Path("model"), "out", **given), found)
    assert (pool.least, pool.most, pool.cpus, pool.gpus) == expected


def test_more_workers_than_there_is_room_for_are_refused():
    wanted = settings.BatchSettings("jobs", Path("model"), "out", workers=5, gpus=0.5)
    with pytest.raises(ValueError, match="5 workers with 0.5 GPUs each found for 2 GPUs, 4 expected at most"):
        ray_pool.sized(wanted, {"CPU": 16.0, "GPU": 2.0})
