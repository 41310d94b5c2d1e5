"""Pictures as people have them: right, or a clear error, the same in the library and in ComfyUI."""

import importlib
import logging

import numpy
import pytest
import torch
from pack.internvl_u.images import ReferenceSizes, open_image, preprocessing_warnings, to_rgb
from pack.internvl_u.prompt import branch_prompts
from pack.internvl_u.tokenizer import Tokenizer
from PIL import Image

RED, WHITE = (255, 0, 0), (255,) * 3
SIZES = ReferenceSizes(16, 10**6, None)
LOSSLESS = {"webp": {"lossless": True}}


def half_red(mode="RGB"):
    image = Image.new("RGB", (8, 4), "white")
    image.paste(RED, (0, 0, 4, 4))
    return image.convert(mode)


def reopened(tmp_path, image, name, **how):
    image.save(tmp_path / name, **how)
    return Image.open(tmp_path / name)


@pytest.mark.parametrize(
    "turn, size, corner", [(1, (8, 4), RED), (3, (8, 4), (255,) * 3), (6, (4, 8), RED), (8, (4, 8), (255,) * 3)]
)
def test_the_way_up_is_the_cameras(tmp_path, turn, size, corner):
    exif = Image.Exif()
    exif[0x0112] = turn
    image = to_rgb(reopened(tmp_path, half_red(), "x.png", exif=exif))
    assert image.size == size and image.getpixel((0, 0)) == corner


@pytest.mark.parametrize("level, expected", [(0, 0), (257 * 128, 128), (65535, 255)])
def test_16_bits_become_8(tmp_path, level, expected):
    deep = Image.fromarray(numpy.full((4, 4), level, dtype=numpy.uint16))
    assert to_rgb(reopened(tmp_path, deep, "x.png")).getpixel((0, 0)) == (expected,) * 3
    assert to_rgb(Image.fromarray(numpy.full((4, 4), level, dtype=numpy.int32))).getpixel((0, 0)) == (expected,) * 3


@pytest.mark.parametrize("value, expected", [(0.5, 128), (-1.0, 0), (7.0, 255), (float("nan"), 0), (float("inf"), 255)])
def test_floating_point_values_are_0_to_1(value, expected):
    image = Image.fromarray(numpy.full((4, 4), value, dtype=numpy.float32))
    assert to_rgb(image).getpixel((0, 0)) == (expected,) * 3
    assert any("above 1" in warning for warning in preprocessing_warnings(image, SIZES)) == (value > 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "RGBX", "RGBa"])
def test_every_usual_mode_becomes_rgb(mode):
    base = half_red("RGBA") if mode in ("RGBa", "PA", "LA") else half_red()
    image = base.convert(mode)
    assert to_rgb(image).mode == "RGB" and to_rgb(image).getpixel((7, 3)) == (255,) * 3


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_of_a_film_the_first_frame_counts_and_that_is_told(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "white")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **LOSSLESS.get(ending, {}))
    image = open_image(tmp_path / f"x.{ending}")
    assert "of its 3 frames the first is taken" in preprocessing_warnings(image, SIZES)
    assert to_rgb(image).getpixel((4, 4)) == RED


def test_a_mode_without_rgb_is_named():
    with pytest.raises(ValueError, match="mode La found"):
        to_rgb(Image.new("LA", (4, 4)).convert("La"))


def test_a_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 1)
    opened = reopened(tmp_path, image, "x.png", transparency=0)
    assert to_rgb(opened).getpixel((0, 0)) == RED and to_rgb(opened).getpixel((1, 1)) == (255,) * 3


def test_of_an_animation_the_first_frame_is_taken_and_that_is_told(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    image = reopened(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert to_rgb(image).getpixel((0, 0))[0] > 250
    assert "of its 3 frames the first is taken" in preprocessing_warnings(image, SIZES)


@pytest.mark.parametrize(
    "image, sentence",
    [
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\) found"),
        (torch.zeros(1, 2, 8, 8, 3), r"\(1, 2, 8, 8, 3\) found"),
        (torch.zeros(0, 8, 8, 3), "an empty IMAGE"),
        (torch.zeros(1, 0, 8, 3), "an empty IMAGE"),
        (torch.zeros(1, 8, 8, 2), "2 channels found"),
        (torch.zeros(1, 8, 8, 5), "5 channels found"),
        ("a file name", "str found"),
        ([torch.zeros(8, 8, 3)], "list found"),
    ],
)
def test_what_is_no_image_is_named(comfyui, image, sentence):
    with pytest.raises(ValueError, match=sentence):
        importlib.import_module("pack.native.images").to_pil_images([image], SIZES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_image_of_another_dtype_is_the_same(comfyui, dtype):
    (image,) = importlib.import_module("pack.native.images").to_pil_images([torch.ones(1, 8, 8, 3, dtype=dtype)], SIZES)
    assert image.getpixel((0, 0)) == (255,) * 3


def test_the_number_of_pictures_has_a_limit(checkpoint):
    tokenizer = Tokenizer(checkpoint / "processor")
    assert len(branch_prompts(tokenizer, "x", images=64, grid=1).conditional.images) == 64
    with pytest.raises(ValueError, match="65 pictures found, 64 expected at most"):
        branch_prompts(tokenizer, "x", images=65, grid=1)


def test_a_cut_text_is_told(checkpoint, caplog):
    from pack.internvl_u.generation import GenerationConfig
    from pack.internvl_u.pipeline import Pipeline

    pipeline = Pipeline(checkpoint)
    with caplog.at_level(logging.WARNING, "internvl_u"):
        written = pipeline.generate("tell me everything", config=GenerationConfig(3))
    assert len(written) == 3 and "cut after 3 tokens" in caplog.text
