"""Ready questions, and texts beside the pictures of a folder."""

import contextlib
import io
import os
from types import SimpleNamespace

import pytest
from pack.internvl_u.__main__ import main
from pack.internvl_u.folder import pictures_in, write_texts
from pack.internvl_u.images import to_rgb
from pack.internvl_u.pipeline import Pipeline
from pack.internvl_u.tasks import AS_WRITTEN, QUESTIONS, TASKS, question_for
from PIL import Image


@pytest.mark.parametrize("written", ["", "what is this", " two\nlines "])
def test_a_question_as_written_stays_as_it_is(written):
    assert question_for(AS_WRITTEN, written) == written


@pytest.mark.parametrize("task", QUESTIONS)
def test_a_task_comes_before_what_is_written(task):
    assert question_for(task) == question_for(task, " \n") == QUESTIONS[task]
    assert question_for(task, "a cat") == f"{QUESTIONS[task]}\na cat"
    assert "<image>" not in QUESTIONS[task] and QUESTIONS[task].endswith(".")


def test_an_unknown_task_is_named():
    assert len(set(TASKS)) == len(TASKS) == 9
    with pytest.raises(ValueError, match="task 'sing' found, one of as written, caption, .* expected"):
        question_for("sing")


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "inner.png").mkdir()
    return tmp_path


def sizes(picture):
    return f"{picture.width} x {picture.height} 猫"


def test_each_picture_gets_a_text_and_nothing_else_does(folder):
    seen = []
    done = write_texts(pictures_in(folder), sizes, on_picture=seen.append)
    assert [file.name for file in done.written] == ["a.txt", "b.txt", "c.txt"]
    assert not done.skipped and not done.failed and len(seen) == 3
    assert (folder / "a.txt").read_bytes() == "20 x 30 猫\n".encode()
    assert sorted(file.name for file in folder.glob("*.txt")) == ["a.txt", "b.txt", "c.txt"]
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))


def test_texts_that_are_there_stay_unless_told_otherwise(folder):
    (folder / "b.txt").write_text("mine", encoding="utf-8")
    asked = []
    done = write_texts(pictures_in(folder), lambda picture: asked.append(picture) or "new")
    assert [file.name for file in done.skipped] == ["b.txt"] and len(asked) == 2
    assert (folder / "b.txt").read_text(encoding="utf-8") == "mine"
    write_texts(pictures_in(folder), lambda picture: "new", overwrite=True)
    assert (folder / "b.txt").read_text(encoding="utf-8") == "new\n"


def test_a_picture_that_cannot_be_read_is_told_of_and_the_rest_goes_on(folder):
    (folder / "b.png").write_bytes(b"no picture")
    done = write_texts(pictures_in(folder), sizes)
    assert [file.name for file in done.written] == ["a.txt", "c.txt"]
    (told,) = done.failed
    assert "b.png is not readable as a picture" in told and not (folder / "b.txt").exists()


def test_two_pictures_of_one_name_do_not_share_a_text(folder):
    Image.new("RGB", (8, 8)).save(folder / "b.bmp")
    done = write_texts(pictures_in(folder), sizes)
    (told,) = done.failed
    assert "b.png left out: b.txt is that of b.bmp" in told
    assert (folder / "b.txt").read_text(encoding="utf-8") == "8 x 8 猫\n"


def test_a_text_that_cannot_be_written_leaves_no_half(folder):
    (folder / "b.txt").mkdir()
    done = write_texts(pictures_in(folder), sizes, overwrite=True)
    (told,) = done.failed
    assert "b.txt not written" in told and len(done.written) == 2
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def test_an_interruption_loses_no_text_that_was_written(folder):
    def stop(picture, asked=[]):  # noqa: B006 - counts the calls
        asked.append(picture)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return "done"

    with pytest.raises(KeyboardInterrupt):
        write_texts(pictures_in(folder), stop)
    assert [file.name for file in folder.glob("*.txt")] == ["a.txt"]
    assert len(write_texts(pictures_in(folder), sizes).written) == 2


def test_a_folder_without_pictures_is_told_of(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere found"):
        pictures_in(tmp_path / "nowhere")
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(FileNotFoundError, match="1 files and no picture found in .*, one of .png .* expected"):
        pictures_in(tmp_path)


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def test_command_line_writes_what_it_answers_of_each_picture(checkpoint, folder):
    line = ["ask", "--model", checkpoint, "--folder", folder, "--max-new-tokens", 4]
    done = command(*line, "--task", "caption")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(folder / name) for name in ("a.txt", "b.txt", "c.txt")]
    with Image.open(folder / "b.png") as picture:
        single = command("ask", "--model", checkpoint, "--image", folder / "b.png", *line[5:], "--task", "caption")
        answer = Pipeline(checkpoint)
        from pack.internvl_u.generation import GenerationConfig

        expected = answer.answer(QUESTIONS["caption"], [to_rgb(picture)], config=GenerationConfig(4))
    assert (folder / "b.txt").read_text(encoding="utf-8") == single.stdout == expected + "\n"
    (folder / "a.JPG").write_bytes(b"broken")
    again = command(*line, "--prompt", "what?")
    assert again.returncode == 0 and again.stdout == "" and "3 texts were there and stay" in again.stderr
    broken = command(*line, "--prompt", "what?", "--overwrite")
    assert broken.returncode == 1 and "a.JPG is not readable" in broken.stderr
    assert "1 of 3 pictures have no text; 2 texts were written" in broken.stderr
    assert (folder / "a.txt").exists()  # the old one


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "neither --prompt nor --task found"),
        (["--task", "tags", "--folder", "f", "--image", "i"], "--folder and --image found"),
        (["--task", "tags", "--folder", "no such folder"], "no folder no such folder found"),
    ],
)
def test_command_line_says_what_is_missing(checkpoint, wrong, message):
    done = command("ask", "--model", checkpoint, *wrong)
    assert done.returncode == 1 and message in done.stderr, done.stderr
