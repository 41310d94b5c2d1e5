"""What people train from: folders, tables and saved datasets, right or a clear error before the first step."""

import hashlib
import json
import logging
import sys
import types

import numpy
import pytest
from pack.internvl_u.finetune import examples as examples_module
from pack.internvl_u.finetune import tables
from pack.internvl_u.finetune.examples import Example, Picture, read_examples, with_trigger
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(file, size=(20, 30), colour=RED, mode="RGB", **how):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(file, **how)
    return file


def captioned(folder, *names, text="a {}"):
    for name in names:
        save(folder / name)
        (folder / name).with_suffix(".txt").write_text(text.format(name), encoding="utf-8")
    return folder


def lines(folder, *rows, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_a_folder_of_pictures_with_texts(tmp_path):
    captioned(tmp_path, "b.png", "a.JPG", "c.webp")
    found = read_examples(tmp_path)
    assert [one.text for one in found] == ["a a.JPG", "a b.png", "a c.webp"]
    assert [one.name for one in found] == [str(tmp_path / name) for name in ("a.JPG", "b.png", "c.webp")]
    assert all(one.references == () and one.thought == "" and one.answer is None for one in found)
    picture = found[1].image
    assert picture.size == (20, 30) and picture.open().size == (20, 30) and picture.open().mode == "RGB"
    assert picture.digest == hashlib.sha256((tmp_path / "b.png").read_bytes()).hexdigest()


def test_a_folder_of_edits(tmp_path):
    for name, colour in (("x", RED), ("y", BLUE)):
        save(tmp_path / "before" / f"{name}.png", colour=colour)
        captioned(tmp_path / "after", f"{name}.jpg", text="turn it")
    found = read_examples(tmp_path)
    assert [one.text for one in found] == ["turn it"] * 2
    assert [one.references[0].open().getpixel((0, 0)) for one in found] == [RED, BLUE]
    assert found[0].image.open().size == (20, 30) and found[0].image.name.endswith("x.jpg")


@pytest.mark.parametrize("before", examples_module.BEFORE)
@pytest.mark.parametrize("after", examples_module.AFTER)
def test_folders_of_edits_may_have_other_names(tmp_path, before, after):
    save(tmp_path / before / "x.png")
    captioned(tmp_path / after, "x.png")
    assert len(read_examples(tmp_path)[0].references) == 1


def test_rows_of_json_lines(tmp_path):
    for name in ("a.png", "in/b.png", "c.png"):
        save(tmp_path / name)
    rows = [
        {"file_name": "a.png", "text": " a cat\r\n", "other": float("nan")},
        {"file_name": "in/b.png", "instruction": "make it red", "source": "a.png", "thought": "I see."},
        {"image": "in\\b.png", "caption": "two", "images": ["a.png", "c.png"]},
        {"question": "What is it?", "answer": "A cat.", "images": "a.png"},
        {"question": "How are you?", "answer": "Well."},
        {"question": "And this?", "answer": "Red.", "file_name": "c.png"},
    ]
    one, two, three, four, five, six = read_examples(lines(tmp_path, *rows))
    assert one.text == "a cat" and one.image.name.endswith("a.png") and one.name.startswith("line 1 of ")
    assert two.thought == "I see." and two.references[0] is one.image
    assert len(three.references) == 2 and three.image.size == (20, 30)
    assert (four.text, four.answer, four.image) == ("What is it?", "A cat.", None) and len(four.references) == 1
    assert five.references == () and six.references[0].name.endswith("c.png")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "mine.jsonl")
    assert len(read_examples(tmp_path / "mine.jsonl")) == 6


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_rows_of_csv(tmp_path, delimiter):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    names = '"[""a.png"", ""b.png""]"'
    rows = ["file_name,prompt,before,thought", 'a.png,"a, b",,', f"b.png,c,{names},so", ",,,"]
    text = "\r\n".join(row if "," not in row[6:12] or True else row for row in rows)
    if delimiter != ",":
        text = text.replace('"a, b"', "'a'").replace(names, "a.png").replace(",", delimiter)
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    one, two = read_examples(tmp_path)
    assert one.text == ("a, b" if delimiter == "," else "'a'") and one.thought == "" and one.references == ()
    assert two.thought == "so" and len(two.references) == (2 if delimiter == "," else 1)
    assert two.name.startswith("line 3 of ")


class Stored:
    """As much of a `datasets.Dataset` as is used of it."""

    def __init__(self, rows):
        self.rows, self.format = rows, None

    def with_format(self, name):
        assert name == "arrow"
        return self

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, where):
        return types.SimpleNamespace(to_pylist=lambda: json_copy(self.rows[where]))


def json_copy(rows):
    return [{k: [dict(x) for x in v] if isinstance(v, list) else v for k, v in row.items()} for row in rows]


def png(tmp_path, colour=RED):
    return {"bytes": save(tmp_path / "one.png", colour=colour).read_bytes(), "path": "one.png"}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that makes `datasets` load rows from the folder that it returns."""

    def make(rows, splits=False):
        folder = tmp_path / "saved"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        dataset = {"train": Stored(rows), "test": Stored([])} if splits else Stored(rows)
        library = types.SimpleNamespace(load_from_disk=lambda name: dataset)
        monkeypatch.setitem(sys.modules, "datasets", library)
        return folder

    return make


@pytest.mark.parametrize("splits", [False, True])
def test_a_saved_dataset(tmp_path, saved, splits):
    red, blue = png(tmp_path), png(tmp_path, BLUE)
    rows = [
        {"image": red, "text": "red", "label": 3},
        {"edited_image": red, "edit_prompt": "turn red", "input_image": blue},
        {"image": red, "caption": "several", "references": [red, blue, red]},
        {"image": blue, "question": "Which colour?", "answer": "Blue."},
    ]
    one, two, three, four = read_examples(saved(rows, splits))
    assert one.text == "red" and one.image.open().getpixel((0, 0)) == RED and one.name.startswith("row 0 of ")
    assert one.image.digest == hashlib.sha256(red["bytes"]).hexdigest()
    assert two.references[0].open().getpixel((0, 0)) == BLUE
    assert [x.open().getpixel((0, 0)) for x in three.references] == [RED, BLUE, RED]
    assert four.answer == "Blue." and four.references[0].open().getpixel((0, 0)) == BLUE


def test_a_saved_dataset_that_cannot_be_used_is_told_of(tmp_path, saved, monkeypatch):
    folder = saved([{"image": {"bytes": None, "path": "/etc/passwd"}, "text": "x"}])
    with pytest.raises(ValueError, match="row 0 of .* a picture's bytes expected: save the dataset with its pictures"):
        read_examples(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="not installed: run `pip install datasets`"):
        read_examples(folder)

    def fail(name):
        raise KeyError("no arrow here")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=fail))
    with pytest.raises(ValueError, match="saved is not readable as a dataset .*no arrow here"):
        read_examples(folder)
    split = types.SimpleNamespace(load_from_disk=lambda name: {"test": Stored([]), "dev": Stored([])})
    monkeypatch.setitem(sys.modules, "datasets", split)
    with pytest.raises(ValueError, match="has the splits test, dev, train expected"):
        read_examples(folder)


def test_a_dataset_that_the_real_library_saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="a large library, which only datasets saved by it need")
    pyarrow = pytest.importorskip("pyarrow")
    red, blue = png(tmp_path), png(tmp_path, BLUE)
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    columns = {"image": [red, blue], "text": ["a", "b"], "images": [[], [red, blue]]}
    table = pyarrow.table(columns, schema=datasets.Features(kinds).arrow_schema)
    made = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="0")
    for saved, name in ((made, "one"), (datasets.DatasetDict({"train": made}), "splits")):
        saved.save_to_disk(str(tmp_path / name))
        found = read_examples(tmp_path / name)
        assert [one.text for one in found] == ["a", "b"] and found[0].references == ()
        assert [one.image.open().getpixel((0, 0)) for one in found] == [RED, BLUE]
        assert [one.open().getpixel((0, 0)) for one in found[1].references] == [RED, BLUE]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a cat", "ohwx, a cat"),
        ("An OHWX cat", "An OHWX cat"),
        ("ohwxes", "ohwx, ohwxes"),
        ("a [trigger] cat", "a ohwx cat"),
        ("", "ohwx"),
    ],
)
def test_the_trigger_comes_into_the_text_once(text, expected):
    assert with_trigger(text, "ohwx", "here") == expected
    if "[" in text:
        with pytest.raises(ValueError, match="here: .trigger. found, and no trigger"):
            with_trigger(text, "", "here")
    else:
        assert with_trigger(text, "", "here") == text


def test_the_trigger_is_for_captions_and_instructions(tmp_path):
    save(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": "a cat"}, {"question": "What?", "answer": "That."}, {"image": "a.png"}]
    assert [one.text for one in read_examples(lines(tmp_path, *rows), " ohwx ")] == ["ohwx, a cat", "What?", "ohwx"]


def test_pictures_without_any_text_are_the_triggers(tmp_path, caplog):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    with caplog.at_level(logging.WARNING):
        assert [one.text for one in read_examples(tmp_path, "ohwx")] == ["ohwx"] * 2
    assert "has no texts: each picture is learned as 'ohwx'" in caplog.text
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"1 of 2 pictures in .* have no text \(a.png\)"):
        read_examples(tmp_path, "ohwx")


def test_files_that_are_not_read_are_told_of(tmp_path, caplog):
    captioned(tmp_path, "a.png")
    for name in ("notes.md", "cat.txt", "b.heic", ".hidden"):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        read_examples(tmp_path)
    assert "3 files of" in caplog.text and "(b.heic, cat.txt, notes.md)" in caplog.text


def test_nothing_to_learn_from_is_told_of(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="0 files and no picture found in .*empty.* Put pictures with a .txt"):
        read_examples(empty)
    (empty / "a.doc").write_text("x")
    with pytest.raises(FileNotFoundError, match="1 files and no picture found .* before and after for edits"):
        read_examples(empty)
    with pytest.raises(FileNotFoundError, match="no folder or file .*nowhere found"):
        read_examples(tmp_path / "nowhere")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="x.parquet found, a folder or a file ending in .jsonl or .csv expected"):
        read_examples(tmp_path / "x.parquet")
    for name, text in (("x.jsonl", ""), ("y.jsonl", "\n \r\n"), ("x.csv", "file_name,text\n,\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(FileNotFoundError, match="has no rows"):
            read_examples(tmp_path / name)


def frames(file, **how):
    first, *rest = (Image.new("RGB", (20, 30), colour) for colour in (RED, BLUE, RED))
    first.save(file, save_all=True, append_images=rest, **how)


def cut(file):
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:3000])


BROKEN = {
    "text": (lambda file: file.write_bytes(b"no picture"), "is not readable as a picture"),
    "empty": (lambda file: file.write_bytes(b""), "is empty: it may not be written yet"),
    "lfs": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "page": (lambda file: file.write_bytes(b"<!DOCTYPE html>"), "is a web page"),
    "gif": (lambda file: frames(file.with_suffix(".gif")), "has 3 frames or pages, one expected"),
    "apng": (frames, "has 3 frames or pages, one expected"),
    "webp": (lambda file: frames(file.with_suffix(".webp")), "has 3 frames or pages"),
    "tiff": (lambda file: frames(file.with_suffix(".tif")), "has 3 frames or pages"),
    "strip": (lambda file: save(file, (1000, 10)), "has 1000 x 10 pixels, one side at most 20 times"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_picture_that_cannot_be_learned_from_is_named(tmp_path, kind):
    make, expected = BROKEN[kind]
    make(tmp_path / "a.png")
    (file,) = tmp_path.iterdir()
    file.with_suffix(".txt").write_text("x")
    with pytest.raises(ValueError, match=f"{file.name} {expected}") as caught:
        read_examples(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_cut_off_is_found_when_it_is_opened(tmp_path):
    cut(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("x")
    (found,) = read_examples(tmp_path)
    with pytest.raises(ValueError, match="a.jpg is not readable as a picture .*: mend it or take it out"):
        found.image.open()


def test_too_large_a_picture_is_named(tmp_path, monkeypatch):
    captioned(tmp_path, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match="a.png is not readable as a picture .*exceeds limit"):
        read_examples(tmp_path)


@pytest.mark.parametrize("mode, ending", [("CMYK", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("1", "png")])
def test_every_usual_mode_is_opened_as_rgb(tmp_path, mode, ending):
    file = save(tmp_path / f"a.{ending}", colour=(255, 255, 255), mode=mode)
    opened = Picture("a", file).open()
    assert opened.mode == "RGB" and min(opened.getpixel((3, 3))) > 250


def test_deep_transparent_and_turned_pictures_are_opened_as_everywhere(tmp_path):
    Image.fromarray(numpy.full((4, 6), 257 * 128, dtype=numpy.uint16)).save(tmp_path / "deep.png")
    assert Picture("x", tmp_path / "deep.png").open().getpixel((0, 0)) == (128,) * 3
    Image.new("RGBA", (4, 6)).save(tmp_path / "clear.png")
    assert Picture("x", tmp_path / "clear.png").open().getpixel((0, 0)) == (255,) * 3
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.jpg", exif=exif)
    assert Picture("x", tmp_path / "turned.jpg").size == Picture("x", tmp_path / "turned.jpg").open().size == (30, 20)


def test_a_photo_with_a_second_picture_behind_it_is_no_animation(tmp_path):
    first, second = Image.new("RGB", (20, 30), RED), Image.new("RGB", (20, 30), BLUE)
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    picture = Picture("a", tmp_path / "a.jpg")
    assert picture.size == (20, 30) and picture.open().getpixel((0, 0))[0] > 250


CAPTIONS = {
    "empty": (b" \r\n", "a.txt is empty, a text expected"),
    "utf-16": ("a cat".encode("utf-16"), "byte 0xff found at place 0, UTF-8 expected"),
    "latin": ("Käse".encode("latin-1"), "byte 0xe4 found at place 1, UTF-8 expected: save it as UTF-8"),
    "zeros": (b"a\0b", r"the text has '\\x00' at character 1"),
    "a megabyte": (b"a cat " * 170_000, "a.txt has 1,020,000 bytes, a text of 100,000 characters expected at most"),
    "many characters": (b"a" * 100_001, "the text has 100,001 characters, 100,000 expected at most"),
    "placeholder": (b"[trigger] cat", "trigger. found, and no trigger"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_that_is_no_text_is_named(tmp_path, kind):
    written, expected = CAPTIONS[kind]
    captioned(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes(written)
    with pytest.raises(ValueError, match=expected) as caught:
        read_examples(tmp_path)
    assert "a.txt" in str(caught.value)


@pytest.mark.parametrize("written", [b"\xef\xbb\xbfa cat\r\nis here\r\n", b"a cat\nis here", b"a cat\ris here"])
def test_captions_of_any_system_are_the_same(tmp_path, written):
    captioned(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(written)
    assert read_examples(tmp_path)[0].text == "a cat\nis here"


def test_missing_captions_are_counted(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png")
    (tmp_path / "8.txt").write_text("x")
    with pytest.raises(ValueError, match=r"8 of 9 pictures .* \(0.png, 1.png, 2.png, 3.png, 4.png, ...\).* as 0.txt"):
        read_examples(tmp_path)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    captioned(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(ValueError, match=r"b.png is not readable .*\. 1 more are wrong \(c.png\)"):
        read_examples(tmp_path)


def test_pictures_of_one_name_do_not_share_a_text(tmp_path):
    captioned(tmp_path, "a.png", "a.jpg", "b.png")
    with pytest.raises(ValueError, match=r"1 pictures .* share their name with another \(a.jpg and a.png\)"):
        read_examples(tmp_path)


def test_unequal_edits_are_named(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "before" / f"{name}.png")
    captioned(tmp_path / "after", "a.png")
    with pytest.raises(
        ValueError, match=r"1 of 2 pictures in .*before have none of the same name in .*after \(b.png\)"
    ):
        read_examples(tmp_path)
    captioned(tmp_path / "after", "b.png", "c.png")
    with pytest.raises(
        ValueError, match=r"1 of 3 pictures in .*after have none of the same name in .*before \(c.png\)"
    ):
        read_examples(tmp_path)
    save(tmp_path / "source" / "a.png")
    with pytest.raises(ValueError, match="has before and source, one of them expected"):
        read_examples(tmp_path)


def test_half_of_an_edit_is_told_of(tmp_path):
    save(tmp_path / "control" / "a.png")
    with pytest.raises(FileNotFoundError, match="has control and none of after, target, output"):
        read_examples(tmp_path)


ROWS = {
    "no JSON": ('{"file_name": "a.png", "text": ', "line 2 of .* is no JSON .*an object a line expected"),
    "a list": ("[1]", "line 2 of .* holds a list, an object such as"),
    "deep": ("[" * 100_000, "line 2 of .* is no JSON"),
    "missing file": ('{"file_name": "no.png", "text": "x"}', "line 2 of .*: no file 'no.png' found in"),
    "out by dots": ('{"file_name": "../secret.png", "text": "x"}', "'../secret.png' leads out of"),
    "absolute": ('{"file_name": "/etc/passwd", "text": "x"}', "'/etc/passwd' leads out of"),
    "out by backslashes": (r'{"file_name": "..\\secret.png", "text": "x"}', "leads out of"),
    "out by a link": ('{"file_name": "link.png", "text": "x"}', "'link.png' leads out of"),
    "a link in a circle": ('{"file_name": "circle.png", "text": "x"}', "circle.png"),
    "a name too long": (json.dumps({"file_name": "a" * 5000, "text": "x"}), "cannot be read|no file"),
    "a zero": (r'{"file_name": "a\u0000.png", "text": "x"}', "a picture's file name expected"),
    "a folder": ('{"file_name": "in", "text": "x"}', "no file 'in' found"),
    "a number": ('{"file_name": 3, "text": "x"}', "3 found, a picture's file name expected"),
    "no text": ('{"file_name": "a.png"}', "line 2 of .*: no text found, one of text, prompt, caption"),
    "blanks": ('{"file_name": "a.png", "text": " "}', "no text found"),
    "NaN": ('{"file_name": "a.png", "text": NaN}', "the text nan found, a text expected"),
    "half a character": (r'{"file_name": "a.png", "text": "\ud800"}', r"the text has '\\ud800' at character 0"),
    "two texts": ('{"file_name": "a.png", "text": "x", "caption": "y"}', "text and caption found, one of them"),
    "nothing": ('{"label": 3}', "neither a picture to draw .* found, but label"),
    "both": ('{"file_name": "a.png", "text": "x", "question": "q", "answer": "a"}', "text beside a question found"),
    "thought and answer": ('{"thought": "x", "question": "q", "answer": "a"}', "thought beside a question found"),
    "both without question": ('{"file_name": "a.png", "text": "x", "answer": "a"}', "an answer without a question"),
    "no question": ('{"answer": "a"}', "an answer without a question found, both expected"),
    "no answer": ('{"question": "a", "images": "a.png"}', "a question without an answer found"),
    "empty answer": ('{"question": "a", "answer": " "}', "a question without an answer found"),
    "many pictures": (
        json.dumps({"file_name": "a.png", "text": "x", "images": ["a.png"] * 65}),
        "65 pictures found, 64",
    ),
    "a broken list": ('{"file_name": "a.png", "text": "x", "images": "[a.png"}', "no list of names found"),
    "not UTF-8": (b'{"file_name": "a.png", "text": "K\xe4se"}', "line 2 of .*: byte 0xe4 found .*UTF-8 expected"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_is_wrong_is_named(tmp_path, kind):
    written, expected = ROWS[kind]
    folder = tmp_path / "set"
    save(folder / "a.png")
    save(tmp_path / "secret.png")
    (folder / "in").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    good = b'{"file_name": "a.png", "text": "x"}\r\n'
    written = written.encode() if isinstance(written, str) else written
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + good + written + b"\n" + good + b"{\n")
    with pytest.raises(ValueError, match=expected) as caught:
        read_examples(folder)
    assert "1 more are wrong (line 4)" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_links_that_lead_out_of_a_folder_are_not_followed(tmp_path):
    folder = captioned(tmp_path / "set", "a.png")
    save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "b.png").symlink_to(tmp_path / "secret.png")
    (folder / "b.txt").write_text("x")
    with pytest.raises(ValueError, match="b.png leads out of .*: copy the file into the folder"):
        read_examples(folder)
    (folder / "b.png").unlink()
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="a.txt leads out of"):
        read_examples(folder)


CSV = {
    "no header": ("a.png,x\n", "begins with 'a.png,x', the columns' names expected, such as file_name,text"),
    "empty": ("", "begins with ''"),
    "too many cells": ("file_name,text\na.png,x,y\n", "line 2 of .*: 3 columns found, 2 expected .* double quotes"),
    "an open quote": ('file_name,text\na.png,"x\n', "is no table of CSV"),
    "a long cell": (f"file_name,text\na.png,{'x' * 200_000}\n", "is no table of CSV .*field larger"),
    "not UTF-8": (b"file_name,text\na.png,K\xe4se\n", "byte 0xe4 found .*UTF-8 expected"),
    "no text": ("file_name,text\na.png\n", "line 2 of .*: no text found"),
}


@pytest.mark.parametrize("kind", CSV)
def test_a_table_that_is_wrong_is_told_of(tmp_path, kind):
    written, expected = CSV[kind]
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(written.encode() if isinstance(written, str) else written)
    with pytest.raises(ValueError, match=expected):
        read_examples(tmp_path)


def test_two_tables_are_one_too_many(tmp_path):
    save(tmp_path / "a.png")
    lines(tmp_path, {"file_name": "a.png", "text": "x"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(ValueError, match="has metadata.jsonl and metadata.csv, one of them expected"):
        read_examples(tmp_path)


def test_huge_tables_end_early(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setattr(tables, "MOST_ROWS", 10)
    folder = lines(tmp_path, *[{"file_name": "a.png", "text": "x"}] * 11)
    with pytest.raises(ValueError, match="has more than 10 rows, 10 expected at most: split it"):
        read_examples(folder)
    assert len(read_examples(lines(folder, *[{"file_name": "a.png", "text": "x"}] * 10))) == 10
    monkeypatch.setattr(tables, "LARGEST_LINE", 1000)
    (tmp_path / "metadata.jsonl").write_bytes(b"[" + b"1," * 10_000)
    with pytest.raises(ValueError, match="line 1 of .* has more than 1,000 bytes: is it JSON lines"):
        read_examples(tmp_path)


def test_an_example_is_one_thing_to_learn(tmp_path):
    picture = Picture("a", save(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="here: both of a picture to draw and an answer found"):
        Example("here", "x", picture, answer="y")
    with pytest.raises(ValueError, match="here: neither of"):
        Example("here", "x")
    with pytest.raises(ValueError, match="here: a thought with an answer found"):
        Example("here", "x", thought="so", answer="y")
