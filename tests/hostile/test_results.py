"""Results of the command line are looked at before the work, written whole or not at all, and never lost."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from pack.internvl_u import results
from pack.internvl_u.__main__ import main
from pack.internvl_u.convert import convert
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DRAW = ["--prompt", "a cat", "--width", "16", "--height", "16", "--steps", "1"]


@pytest.fixture
def run(capsys, checkpoint):
    def call(*arguments):
        status = main([arguments[0], "--model", str(checkpoint), *map(str, arguments[1:])])
        told = capsys.readouterr()
        return status, told.out, "\n".join(line for line in told.err.splitlines() if line.startswith("internvl_u"))

    return call


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("folder.png", "is a folder, a file expected"),
        ("a" * 300 + ".png", "nothing can be written there"),
        ("no/where.png", "no folder"),
        ("file.png/x.png", "no folder"),
        ("x.jpg", "a name ending in .png expected"),
    ],
)
def test_where_nothing_can_be_written_is_seen_before_the_work(run, tmp_path, monkeypatch, name, sentence):
    from pack.internvl_u import pipeline

    monkeypatch.setattr(pipeline.Pipeline, "draw", lambda *args: pytest.fail("began to draw"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").write_bytes(b"")
    status, _, error = run("draw", *DRAW, "--out", tmp_path / name)
    assert status == 1 and sentence in error, error


def test_looking_leaves_nothing_and_touches_nothing(tmp_path):
    old = tmp_path / "old.png"
    old.write_bytes(b"old")
    results.check_target(old)
    results.check_target(tmp_path / "new.png")
    assert old.read_bytes() == b"old" and os.listdir(tmp_path) == ["old.png"]


def test_a_full_disk_leaves_the_old_picture_and_keeps_the_new_one_elsewhere(tmp_path, monkeypatch):
    old = tmp_path / "old.png"
    old.write_bytes(b"old")
    replace = os.replace

    def full(source, target):
        if str(target) == str(old):
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="not written .No space left on device.. The picture is in ") as told:
        results.save_image(Image.new("RGB", (4, 4), "red"), old, PngInfo())
    assert old.read_bytes() == b"old" and os.listdir(tmp_path) == ["old.png"]
    with Image.open(str(told.value).rsplit(" in ", 1)[1]) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_no_answer_is_lost_for_a_character_that_the_console_lacks(run, monkeypatch, encoding):
    from pack.internvl_u import pipeline

    monkeypatch.setattr(pipeline.Pipeline, "answer", lambda *args: "a \N{SNOWMAN} and 猫\N{GRINNING FACE}")
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    status, _, _ = run("ask", "--prompt", "x")
    shown.flush()
    text = shown.buffer.getvalue().decode(encoding)
    assert status == 0 and text.startswith("a ") and "\\U0001f600" in text


@pytest.mark.parametrize("where", ["", "vae", "deep/er"])
def test_a_conversion_into_its_own_source_is_refused(broken, where):
    before = sorted(broken.rglob("*"))
    with pytest.raises(ValueError, match="lies in the checkpoint folder"):
        convert(broken, broken / where)
    assert sorted(broken.rglob("*")) == before


def test_two_conversions_at_once_do_not_mix(checkpoint, tmp_path):
    code = "import sys; from internvl_u.__main__ import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "convert", "--model", str(checkpoint), "--out", str(tmp_path)]
    root = checkpoint.parent.parent.parent
    running = [subprocess.Popen(line, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    statuses = [process.wait(120) for process in running]
    assert 0 in statuses
    import hashlib

    for file in tmp_path.rglob("*.safetensors"):
        stated = file.with_name(file.name + ".sha256").read_text().split()[0]
        assert stated == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process hears")
def test_a_terminated_conversion_leaves_no_part(checkpoint, tmp_path):
    code = (
        "import sys, time; from internvl_u import convert; chunks = convert.SourceTensor.chunks\n"
        "convert.SourceTensor.chunks = lambda self: (time.sleep(0.05) or one for one in chunks(self))\n"
        "from internvl_u.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, "convert", "--model", str(checkpoint), "--out", str(tmp_path)]
    process = subprocess.Popen(line, cwd=checkpoint.parent.parent.parent, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("*.part"))


def test_a_job_without_a_page_writes_into_no_page(comfyui, monkeypatch):
    from types import SimpleNamespace

    import server as comfy_server
    from pack.native import progress

    sent = []
    instance = SimpleNamespace(client_id=None, send_sync=lambda *event: sent.append(event))
    monkeypatch.setattr(comfy_server.PromptServer, "instance", instance, raising=False)
    hidden = SimpleNamespace(unique_id="3", extra_pnginfo=None, dynprompt=None)
    progress.show(hidden, "secret")
    assert not sent
    instance.client_id = "page"
    for odd in (
        None,
        [],
        "x",
        5,
        {"workflow": None},
        {"workflow": []},
        {"workflow": {"id": 5}},
        {"workflow": {"id": []}},
    ):
        hidden.extra_pnginfo = odd
        progress.show(hidden, "text")
    assert len(sent) == 8 and all(json.dumps(event) and event[1]["workflow"] is None for event in sent)
