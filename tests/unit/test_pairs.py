"""Maps of pictures, and folders of pairs to learn control from."""

import os

import numpy
import pytest
import torch
from pack.internvl_u.__main__ import main
from pack.internvl_u.defaults import MAP_KINDS, MAP_SIZE, MAP_THRESHOLDS
from pack.internvl_u.finetune import maps, pairs
from pack.internvl_u.finetune.maps import Thresholds, canny, make_map, map_instruction
from PIL import Image, ImageDraw
from torch.nn import functional

SIZES = [(3, 3), (3, 40), (64, 64), (33, 90), (200, 300)]


def clouds(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, max(2, height // 6), max(2, width // 6), generator=generator)
    return functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def disc(size=96, colour="red"):
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse([size * 0.2, size * 0.3, size * 0.6, size * 0.7], fill=colour)
    return image


# Maps


@pytest.mark.parametrize("thresholds", [MAP_THRESHOLDS, (0.05, 0.1), (0.2, 2.0)])
@pytest.mark.parametrize("size", SIZES)
def test_edges_are_those_of_comfyuis_canny(size, thresholds):
    filters = pytest.importorskip("kornia.filters")
    pixels = clouds(*size)
    assert torch.equal(canny(pixels, Thresholds(*thresholds)), filters.canny(pixels, *thresholds)[1])


def test_edges_of_drawn_things_are_comfyuis_but_for_ties():
    filters = pytest.importorskip("kornia.filters")
    pixels = torch.from_numpy(numpy.array(disc(200))).movedim(-1, 0)[None].float() / 255
    ours, theirs = canny(pixels), filters.canny(pixels, *MAP_THRESHOLDS)[1]
    # Where two pixels are equally strong, the order of a sum decides.
    assert (ours != theirs).sum() <= 0.05 * theirs.sum()
    assert not (ours.bool() & (functional.max_pool2d(theirs, 3, 1, 1) == 0)).any()


def test_an_edge_is_one_pixel_wide_and_where_the_step_is():
    pixels = torch.zeros(1, 3, 20, 20)
    pixels[..., 8:] = 1
    edges = canny(pixels)[0, 0]
    assert edges.sum() == 20 and (edges[:, 7:9].sum(1) == 1).all()
    turned = canny(pixels.mT)[0, 0]
    assert turned.sum() == 20 and (turned[7:9].sum(0) == 1).all()
    assert canny(torch.full((1, 3, 9, 9), 0.5)).sum() == 0


def test_weak_edges_count_where_they_hang_on_strong_ones():
    ramp = torch.linspace(0.02, 1, 60)[None, None, :, None].repeat(1, 3, 1, 40)
    pixels = torch.where(torch.arange(40) < 20, 0.0, ramp)
    assert canny(pixels, Thresholds(0.1, 2.0))[0, 0, 5:].sum(-1).min() >= 1
    assert canny(pixels, Thresholds(0.1, 2.7)).sum() == 0


@pytest.mark.parametrize("kind", MAP_KINDS)
@pytest.mark.parametrize("size", [(3, 3), (5, 400), (300, 7), (1000, 600)])
def test_a_map_has_the_size_of_its_picture(kind, size):
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8))
    found = make_map(image, kind)
    assert found.size == size and found.mode == "RGB"
    if kind != "colour":
        assert set(numpy.unique(numpy.array(found))) <= {0, 255}


def test_maps_say_what_they_should():
    image = disc(256, "blue")
    edges, colours, lines = (numpy.array(make_map(image, kind)) for kind in MAP_KINDS)
    inside, middle = slice(100, 150), slice(85, 125)
    assert edges[inside, middle].max() == 0 and 200 < (edges[..., 0] == 255).sum() < 1500
    assert (colours[128, 100] == (0, 0, 255)).all() and len(numpy.unique(colours.reshape(-1, 3), axis=0)) < 60
    assert (lines == 255).sum() > 2 * (edges == 255).sum()
    thin = make_map(image, "canny").convert("L")
    near = functional.max_pool2d(torch.from_numpy(numpy.array(thin))[None].float(), 9, 1, 4)[0]
    assert not ((lines[..., 0] == 255) & (near.numpy() == 0)).any()


def test_what_goes_with_a_map_is_a_fixed_phrase_and_the_caption():
    assert map_instruction("canny", " a red circle \n") == "Draw from this edge map: a red circle"
    assert map_instruction("scribble") == "Draw from this scribble"
    assert set(maps.KINDS) == set(MAP_KINDS) and len({map_instruction(kind) for kind in MAP_KINDS}) == 3


# Folders


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    for name, size in (("b.png", 40), ("a.JPG", 64), ("c.webp", 50)):
        disc(size).save(source / name)
    (source / "a.txt").write_text("a red disc\n", encoding="utf-8")
    (source / "b.txt").write_text("红色的圆形", encoding="utf-8-sig")
    return source


def files(out):
    return sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())


WHOLE = ["after/a.JPG", "after/a.txt", "after/b.png", "after/b.txt", "after/c.txt", "after/c.webp"]
WHOLE += ["before/a.png", "before/b.png", "before/c.png", "pairs.json"]


def test_each_picture_gets_its_map_and_its_words(folder, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert main(["pairs", str(folder), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n" and "1 of 3 pictures have no .txt: no caption" in captured.err
    assert files(out) == WHOLE
    assert (out / "after" / "a.txt").read_text() == "Draw from this edge map: a red disc\n"
    assert (out / "after" / "b.txt").read_text(encoding="utf-8") == "Draw from this edge map: 红色的圆形\n"
    assert (out / "after" / "c.txt").read_text() == "Draw from this edge map\n"
    assert (out / "after" / "a.JPG").read_bytes() == (folder / "a.JPG").read_bytes()
    found = Image.open(out / "before" / "b.png")
    assert found.tobytes() == make_map(Image.open(folder / "b.png").convert("RGB"), "canny").tobytes()


def test_it_goes_on_where_it_was_and_makes_the_broken_anew(folder, tmp_path):
    out = tmp_path / "pairs"
    pictures = sorted(folder.glob("*.[pJw]*"))
    pairs.make_pairs(pictures, out, "canny")
    (out / "after" / "b.txt").unlink()
    kept = (out / "before" / "a.png").stat().st_mtime_ns
    done = pairs.make_pairs(pictures, out, "canny")
    assert [file.name for file in done.written] == ["b.png"] and len(done.skipped) == 2 and files(out) == WHOLE
    assert (out / "before" / "a.png").stat().st_mtime_ns == kept


def test_an_interruption_leaves_no_half_pair(folder, tmp_path, monkeypatch):
    out = tmp_path / "pairs"
    replaced = os.replace
    seen = []

    def stop(source, target):
        seen.append(target)
        if len(seen) == 4:  # settings, map, picture, then its text
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        pairs.make_pairs([folder / "a.JPG"], out, "canny")
    assert files(out) == ["after/a.JPG", "before/a.png", "pairs.json"]
    monkeypatch.undo()
    assert len(pairs.make_pairs([folder / "a.JPG"], out, "canny").written) == 1


@pytest.mark.parametrize("option", [["--kind", "colour"], ["--low", "0.1"], ["--size", "512"]])
def test_pairs_of_other_settings_do_not_mix(folder, tmp_path, capsys, option):
    out = tmp_path / "pairs"
    assert main(["pairs", str(folder), "--out", str(out)]) == 0
    assert main(["pairs", str(folder), "--out", str(out), *option]) == 1
    assert "holds pairs of kind canny, low 0.4, high 0.8, size 1024" in capsys.readouterr().err


def test_large_pictures_have_small_maps_and_stay_as_they_are(folder, tmp_path):
    disc(800).resize((1600, 400)).save(folder / "a.JPG")
    pairs.make_pairs([folder / "a.JPG"], tmp_path / "pairs", "canny", size=200)
    assert Image.open(tmp_path / "pairs" / "before" / "a.png").size == (400, 100)
    assert Image.open(tmp_path / "pairs" / "after" / "a.JPG").size == (1600, 400)
    assert MAP_SIZE == 1024


def test_a_map_is_the_way_up_of_its_picture(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    disc(64).resize((64, 32)).save(folder / "a.JPG", exif=exif)
    pairs.make_pairs([folder / "a.JPG"], tmp_path / "pairs", "canny")
    assert Image.open(tmp_path / "pairs" / "before" / "a.png").size == (32, 64)


def animated(file):
    frames = [disc(32, colour) for colour in ("red", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:])


HARM = {
    "no picture": (lambda folder: (folder / "x.png").write_bytes(b"no picture"), "it is not readable as a picture"),
    "empty": (lambda folder: (folder / "x.png").touch(), "it is not readable as a picture"),
    "cut off": (
        lambda folder: (folder / "x.png").write_bytes((folder / "b.png").read_bytes()[:80]),
        "it is not readable as a picture",
    ),
    "two pixels": (lambda folder: disc(2).save(folder / "x.png"), "2 x 2 pixels found, at least 3 x 3 expected"),
    "animated": (lambda folder: animated(folder / "x.gif"), "it has 2 frames, one expected"),
    "same name": (lambda folder: disc().save(folder / "a.png"), "has the same name. Rename one of the two"),
    "caption of bytes": (lambda folder: (folder / "c.txt").write_bytes(b"\xff\xfe\xff"), "c.txt is no text in UTF-8"),
    "endless caption": (lambda folder: (folder / "c.txt").write_bytes(b"x" * 70000), "c.txt has 70000 bytes, 65536"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_cannot_be_a_pair_is_told_and_the_others_are_made(folder, tmp_path, capsys, harm):
    make, expected = HARM[harm]
    make(folder)
    assert main(["pairs", str(folder), "--out", str(tmp_path / "pairs")]) == 1
    error = capsys.readouterr().err
    assert expected in error and "left out" in error and "have no pair" in error and "Traceback" not in error
    assert len(list((tmp_path / "pairs" / "after").glob("*.txt"))) >= 2
    assert not list((tmp_path / "pairs").rglob("*.part"))


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda folder: (folder / "nothing", folder / "out"), "no folder .*nothing found"),
        (lambda folder: (folder, folder), "is the folder of the pictures, another one expected"),
        (lambda folder: (folder, folder / "a.txt"), "nothing can be written there"),
        (lambda folder: (folder, folder.parent), "holds other files and no pairs.json: choose another folder"),
    ],
)
def test_wrong_folders_are_named(folder, make, expected, capsys):
    import re

    source, out = make(folder)
    assert main(["pairs", str(source), "--out", str(out)]) == 1
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    "option", [["--low", "0"], ["--high", "nan"], ["--low", "0.9"], ["--size", "15"], ["--size", "5000"]]
)
def test_wrong_numbers_are_named_before_any_work(folder, tmp_path, option, capsys):
    assert main(["pairs", str(folder), "--out", str(tmp_path / "pairs"), *option]) == 1
    assert "expected" in capsys.readouterr().err and not (tmp_path / "pairs").exists()


def test_damaged_settings_are_named(folder, tmp_path, capsys):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.json").write_text("{")
    assert main(["pairs", str(folder), "--out", str(tmp_path / "pairs")]) == 1
    assert "pairs.json" in capsys.readouterr().err
