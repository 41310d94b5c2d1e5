"""Results of the command line are looked at before the work, written whole or not at all, and never lost."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from pack.internvl_u import results
from pack.internvl_u.__main__ import main
from pack.internvl_u.convert import convert
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DRAW = ["--prompt", "a cat", "--width", "16", "--height", "16", "--steps", "1"]


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """The temporary folder, in which results are kept that cannot be put where they belong."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


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

    monkeypatch.setattr(pipeline.Pipeline, "draw_several", lambda *args: pytest.fail("began to draw"))
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


def red(size=4):
    return Image.new("RGB", (size, size), "red")


def is_red(file):
    with Image.open(file) as image:
        return image.getpixel((0, 0)) == (255, 0, 0)


def kept_file(error):
    return str(error).rsplit(" in ", 1)[1]


def state(file):
    """What a file is, without the time at which it was last looked at."""
    found = file.lstat()
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.mark.skipif(os.name == "nt", reason="POSIX")
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to itself", "read-only", "link to read-only"])
def test_what_no_picture_may_replace_is_seen_before_the_work_and_stays(run, tmp_path, monkeypatch, kind):
    from pack.internvl_u import pipeline

    monkeypatch.setattr(pipeline.Pipeline, "draw_several", lambda *args: pytest.fail("began to draw"))
    out, other = tmp_path / "out.png", tmp_path / "other.png"
    if kind == "pipe":
        os.mkfifo(out)
    elif kind.startswith("link"):
        out.symlink_to({"link to a device": "/dev/full", "link to itself": "out.png"}.get(kind, "other.png"))
    if "read-only" in kind:
        file = other if "link" in kind else out
        file.write_bytes(b"old")
        file.chmod(0o444)
    before = sorted(os.listdir(tmp_path)), state(out)
    sentences = {
        "pipe": "is a device or a pipe, a file expected",
        "link to a device": "is a device or a pipe, a file expected",
        "link to itself": "nothing can be written there",
    }
    status, _, error = run("draw", *DRAW, "--out", out)
    assert status == 1 and sentences.get(kind, "is there and read-only: give another name") in error, error
    assert (sorted(os.listdir(tmp_path)), state(out)) == before


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_stays_a_link(run, tmp_path, there):
    (tmp_path / "folder").mkdir()
    target, out = tmp_path / "folder" / "target.png", tmp_path / "out.png"
    if there:
        target.write_bytes(b"old")
    out.symlink_to(target)
    status, _, error = run("draw", *DRAW, "--out", out)
    assert status == 0, error
    assert out.is_symlink() and Image.open(target).size == (16, 16)
    assert os.listdir(target.parent) == ["target.png"]


def test_a_picture_may_replace_the_one_that_it_is_made_of(run, tmp_path):
    file = tmp_path / "picture.png"
    red(16).save(file)
    status, _, error = run("draw", *DRAW, "--image", file, "--out", file)
    assert status == 0, error
    with Image.open(file) as image:
        assert json.loads(image.text["internvl_u"])["images"] == ["picture.png"]
    assert os.listdir(tmp_path) == ["picture.png"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["open", "replace", "fsync"])
def test_a_picture_is_kept_whatever_the_system_refuses(tmp_path, monkeypatch, call, number):
    """Rights taken away, a disk pulled out or filled up, a file system that cannot rename: all during the work."""
    old = tmp_path / "old.png"
    old.write_bytes(b"old")
    where = {"open": Path, "replace": os, "fsync": os}[call]
    original, refused = getattr(where, call), []

    def refuse(first, *rest, **options):
        # One call of fsync is for the folder asked for; the next one is for what is kept.
        if not refused and (call == "fsync" or Path(first).parent == tmp_path):
            refused.append(first)
            raise OSError(number, os.strerror(number))
        return original(first, *rest, **options)

    monkeypatch.setattr(where, call, refuse)
    with pytest.raises(OSError, match=f"old.png: not written .{os.strerror(number)}.. The picture is in ") as told:
        results.save_image(red(), old, PngInfo())
    monkeypatch.undo()
    assert refused and old.read_bytes() == b"old" and os.listdir(tmp_path) == ["old.png"]
    assert is_red(kept_file(told.value))


def test_a_folder_that_disappears_during_the_work_does_not_take_the_picture_with_it(run, tmp_path, monkeypatch):
    from pack.internvl_u import pipeline

    folder = tmp_path / "folder"
    folder.mkdir()

    def draw(*args):
        shutil.rmtree(folder)
        yield red(16)

    monkeypatch.setattr(pipeline.Pipeline, "draw_several", draw)
    status, _, error = run("draw", *DRAW, "--out", folder / "out.png")
    assert status == 1 and "not written (No such file or directory). The picture is in " in error
    assert is_red(kept_file(error))


def test_a_picture_that_fits_nowhere_is_an_error_that_says_so(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"not written .*The picture is lost: the temporary folder does not take it"):
        results.save_image(red(), tmp_path / "out.png", PngInfo())
    assert os.listdir(tmp_path) == os.listdir(tempfile.tempdir) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("stop, status", [(KeyboardInterrupt, 1), (lambda: SystemExit(143), 143)])
def test_stopped_while_it_saves_leaves_the_old_picture_and_no_part(run, tmp_path, monkeypatch, call, stop, status):
    old = tmp_path / "old.png"
    old.write_bytes(b"old")

    def stopped(*args):
        raise stop()

    monkeypatch.setattr(os, call, stopped)
    if status == 1:
        assert run("draw", *DRAW, "--out", old)[::2] == (1, "internvl_u: interrupted")
    else:
        with pytest.raises(SystemExit):
            run("draw", *DRAW, "--out", old)
    assert old.read_bytes() == b"old" and os.listdir(tmp_path) == ["old.png"]


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


def test_a_vae_that_cannot_be_loaded_is_found_before_the_work(broken, monkeypatch):
    pipeline = Pipeline(broken)
    monkeypatch.setattr(pipeline, "encode_prompt", lambda request: pytest.fail("began to work"))
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="is empty"):
        pipeline.draw(ImageRequest("x", 16, 16, 1))
