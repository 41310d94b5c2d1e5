"""Odd consoles and names: texts in any locale, names that are no UTF-8, and streams that nobody reads."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pack.internvl_u import console, results
from pack.internvl_u.__main__ import main
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
SIZE = ["--width", "16", "--height", "16", "--steps", "1"]
WORDS = ["--prompt", "猫 and \N{GRINNING FACE}", "--system", "Zeichne größer."]
ASK = ["ask", "--prompt", "猫?", "--system", "größer", "--max-new-tokens", "8"]
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""The C locale as it is: Python takes bytes of an argument beyond ASCII for surrogate escapes."""


def command(checkpoint, *arguments):
    model = [] if "--model" in arguments else ["--model", str(checkpoint)]
    return [sys.executable, "-m", "internvl_u", arguments[0], *model, *arguments[1:]]


@pytest.fixture
def start(checkpoint, tmp_path):
    """Runs the command line in a process of its own; its temporary folder is the test's."""
    (tmp_path / "kept").mkdir()

    def call(*arguments, env=None, **streams):
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120} | streams
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
        env = clean | {"LC_ALL": "C.UTF-8", "TMPDIR": str(tmp_path / "kept")} | (env or {})
        return subprocess.run(command(checkpoint, *arguments), cwd=ROOT, env=env, **given)

    return call


@pytest.fixture
def answer(checkpoint, monkeypatch):
    """What the tiny model answers to ASK, as this process has it."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert main(command(checkpoint, *ASK)[3:]) == 0
    return told.getvalue()


def kept(folder):
    (file,) = (folder / "kept").glob("internvl_u_*/*")
    return file


def metadata(file):
    with Image.open(file) as image:
        return json.loads(image.text["internvl_u"])


def pixels(file):
    with Image.open(file) as image:
        return image.tobytes()


@pytest.fixture
def latin_1(tmp_path):
    """What makes the locale Latin-1, where the system can make one."""
    name = "de_DE.ISO-8859-1"
    line = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / name)]
    with contextlib.suppress(OSError):
        if subprocess.run(line, capture_output=True).returncode == 0:
            return PLAIN | {"LC_ALL": name, "LOCPATH": str(tmp_path)}
    pytest.skip("this system cannot make a Latin-1 locale (localedef)")


ENVIRONMENTS = {
    "C": PLAIN,
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": PLAIN | {"PYTHONIOENCODING": "ascii"},
    "cp932": {"PYTHONIOENCODING": "cp932"},
}


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX alone")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_question_in_utf_8_is_the_same_question_in_every_locale(start, answer, name):
    done = start(*ASK, env=ENVIRONMENTS[name])
    assert done.returncode == 0, done.stderr
    encoding = "ascii" if name == "C" else name
    assert done.stdout == answer.encode(encoding, "backslashreplace")


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX alone")
def test_a_picture_in_the_c_locale_is_the_one_of_utf_8_with_the_same_metadata(start, checkpoint, tmp_path):
    (tmp_path / "模型").symlink_to(checkpoint)
    shutil.copy(ROOT / "tests" / "data" / "golden" / "image_a.png", tmp_path / "图.png")
    line = ["draw", "--model", str(tmp_path / "模型"), *WORDS, *SIZE, "--image", str(tmp_path / "图.png")]
    line += ["--thought", "erst 考えて"]
    assert main([*line, "--out", str(tmp_path / "here.png")]) == 0
    done = start(*line, "--out", str(tmp_path / "画.png"), env=PLAIN)
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "画.png") == pixels(tmp_path / "here.png")
    found = metadata(tmp_path / "画.png")
    assert found == metadata(tmp_path / "here.png")
    assert found["prompt"] == WORDS[1] and found["thought"] == "erst 考えて" and found["system"] == WORDS[3]
    assert (found["model"], found["images"]) == ("模型", ["图.png"])


def test_a_latin_1_console_is_taken_at_its_word(start, tmp_path, latin_1):
    out = str(tmp_path / "out.png")
    done = start("draw", b"--prompt", "größer".encode("latin-1"), *SIZE, "--out", out, env=latin_1)
    assert done.returncode == 0, done.stderr
    assert metadata(out)["prompt"] == "größer"


@pytest.mark.parametrize("option", ["--prompt", "--system", "--thought"])
@pytest.mark.parametrize(
    "text, found",
    [
        (os.fsdecode(b"gr\xf6\xdfer"), "the byte 0xf6 found at byte 2"),
        (os.fsdecode("猫".encode()[:2]), "the byte 0xe7 found at byte 0"),
        ("x\ud800", "half a character .a lone surrogate, .*ud800.. found at character 1"),
    ],
)
def test_a_text_that_is_no_utf_8_is_refused_in_a_sentence(checkpoint, tmp_path, capsys, option, text, found):
    import re

    words = {"--prompt": "x"} | {option: text}
    line = [part for pair in words.items() for part in pair]
    with pytest.raises(SystemExit) as ended:
        main(command(checkpoint, "draw", *line, "--out", str(tmp_path / "x.png"))[3:])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told
    assert re.search(f"argument {option}: {found}, UTF-8 expected: give the text in UTF-8", told), told


def test_the_c_locale_takes_bytes_for_surrogates_and_they_are_taken_back():
    assert console.text_argument("猫".encode().decode("ascii", "surrogateescape")) == "猫"
    assert console.text_argument("") == "" and console.text_argument("é猫") == "é猫"
    assert console.shown_name("猫.png".encode().decode("ascii", "surrogateescape")) == "猫.png"
    assert console.shown_name(os.fsdecode(b"a\xff.png")) == "a\\xff.png"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are UTF-8 there")
def test_names_that_are_no_utf_8_lose_no_picture(checkpoint, tmp_path, capsys):
    folder = os.fsencode(tmp_path)
    image, out = (Path(os.fsdecode(folder + name)) for name in (b"/i\xfe.png", b"/o\xfd.png"))
    shutil.copy(ROOT / "tests" / "data" / "golden" / "image_a.png", image)
    line = ["draw", "--model", str(checkpoint), "--prompt", "x", *SIZE, "--image", str(image), "--out", str(out)]
    assert main(line) == 0, capsys.readouterr().err
    assert metadata(out)["images"] == ["i\\xfe.png"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are UTF-8 there")
def test_a_model_whose_path_is_no_utf_8_is_refused_before_the_work_and_found_over_a_link(checkpoint, tmp_path, capsys):
    model, link = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")), tmp_path / "model"
    shutil.copytree(checkpoint, model)
    line = ["--prompt", "x", *SIZE, "--out", str(tmp_path / "x.png")]
    assert main(["draw", "--model", str(model), *line]) == 1
    told = capsys.readouterr().err
    assert "m\\xff: a path that is no UTF-8 found" in told and "step" not in told, told
    link.symlink_to(model)
    assert main(["draw", "--model", str(link), *line]) == 0
    assert main(["draw", "--model", str(link / ".." / os.fsdecode(b"m\xff")), *line]) == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are UTF-8 there")
def test_an_error_about_a_name_that_is_no_utf_8_is_a_sentence(checkpoint, tmp_path, start):
    name = os.fsencode(tmp_path) + b"/i\xfe.png"
    done = start("ask", "--prompt", "x", "--image", name)
    assert done.returncode == 1 and b"is not readable as a picture" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("out", ["full", "closed", "pipe"])
def test_an_answer_that_stdout_does_not_take_is_kept(start, answer, tmp_path, out):
    def close():
        os.close(1)

    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full, os.fdopen(writing, "wb") as pipe:
        given = {"full": {"stdout": full}, "pipe": {"stdout": pipe}, "closed": {"stdout": None, "preexec_fn": close}}
        done = start(*ASK, **given[out])
    assert done.returncode == 1
    line = done.stderr.decode().splitlines()[-1]  # before it: that the answer was cut
    assert line.startswith("internvl_u: stdout: not written (") and line.endswith(f"The answer is in {kept(tmp_path)}")
    assert kept(tmp_path).read_text(encoding="utf-8") == answer


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("err", ["full", "closed", "pipe", "all closed"])
def test_a_picture_is_drawn_though_nobody_can_read_the_thought_or_the_progress(start, tmp_path, err):
    def close():
        os.closerange(0 if err == "all closed" else 2, 3)

    reading, writing = os.pipe()
    os.close(reading)
    out = tmp_path / "out.png"
    with open("/dev/full", "wb") as full, os.fdopen(writing, "wb") as pipe:
        closed = {"stderr": None, "preexec_fn": close}
        given = {"full": {"stderr": full}, "pipe": {"stderr": pipe}}.get(err, closed)
        line = ["draw", "--prompt", "x", "--think", "--max-new-tokens", "6", *SIZE, "--out", str(out)]
        done = start(*line, **given)
    assert done.returncode == 0
    assert metadata(out)["thought"] and os.listdir(tmp_path / "kept") == []
    assert pixels(out)


@pytest.mark.skipif(os.name == "nt", reason="POSIX")
def test_an_error_though_nobody_can_read_it_is_an_exit_status(start, tmp_path):
    done = start("ask", "--prompt", "x", "--image", str(tmp_path / "no.png"), preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_conversion_whose_list_nobody_can_read_is_whole(start, tmp_path):
    with open("/dev/full", "wb") as full:
        done = start("convert", "--out", str(tmp_path / "models"), stdout=full)
    assert done.returncode == 1 and b"Exception ignored" not in done.stderr
    files = kept(tmp_path).read_text().split()
    assert len(files) == 3 and all(Path(file).is_file() for file in files)


@pytest.mark.skipif(os.name == "nt", reason="POSIX")
def test_progress_on_a_terminal_that_goes_away_loses_no_picture(start, tmp_path):
    import pty

    ours, theirs = pty.openpty()
    os.close(ours)
    out = tmp_path / "out.png"
    done = start("draw", "--prompt", "x", *SIZE, "--out", str(out), stderr=theirs)
    os.close(theirs)
    assert done.returncode == 0 and pixels(out)


def test_where_nothing_keeps_an_answer_the_error_says_so(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(results.tempfile, "mkdtemp", full)
    with pytest.raises(OSError, match="it is closed.*The answer is lost: .* .No space left on device"):
        results.write_text("x", "answer")
