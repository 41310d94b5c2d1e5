import numpy
import pytest
import torch
from pack.internvl_u import images
from pack.internvl_u.images import ReferenceSizes
from PIL import Image


def test_reference_sizes_equal_the_official_rule(manifest):
    for height, width, fitted_height, fitted_width in manifest["smart_resize"]:
        assert ReferenceSizes().fit(width, height) == (fitted_width, fitted_height)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 9000), (16, 16), (20000, 30000), (15, 1024)])
def test_any_picture_gets_a_size_that_can_be_drawn(size):
    width, height = ReferenceSizes().fit(*size)
    assert width % 16 == height % 16 == 0
    assert 16 <= width <= 1024 and 16 <= height <= 1024
    assert (width > height) == (size[0] > size[1]) or width == height


def test_pixels_equal_the_official_ones(golden, checkpoint):
    import json

    sizes = ReferenceSizes.from_config(json.loads((checkpoint / "processor" / "processor_config.json").read_text()))
    for name in ("edit_one", "edit_placeholder", "edit_large_ref"):
        case = golden(name)
        with Image.open(case.images[0]) as image:
            seen = images.vision_pixels(image, 112, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            reference = images.reference_pixels(image, sizes)
        assert torch.allclose(seen[0], case["pixel_values"][0], atol=1e-6)
        assert torch.equal(reference[0], case["pixel_values_gen"][0])


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert numpy.asarray(images.to_rgb(image)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert any("white" in remark for remark in images.preprocessing_warnings(image, ReferenceSizes()))


@pytest.mark.parametrize("mode, colour", [("L", 128), ("1", 1), ("P", 0), ("I;16", 40000), ("CMYK", (0, 0, 0, 0))])
def test_other_modes_become_rgb(mode, colour):
    assert images.to_rgb(Image.new(mode, (4, 4), colour)).mode == "RGB"


def test_unusual_pictures_are_remarked_on_and_usual_ones_not():
    sizes = ReferenceSizes()
    assert images.preprocessing_warnings(Image.new("RGB", (640, 480)), sizes) == []
    assert "stretched" in images.preprocessing_warnings(Image.new("RGB", (1, 300)), sizes)[0]
    assert images.scaling_remarks(Image.new("RGB", (640, 480)), sizes) == []
    assert images.preprocessing_warnings(Image.new("RGB", (8000, 6000)), sizes) == []
    assert "scaled down" in images.scaling_remarks(Image.new("RGB", (8000, 6000)), sizes)[0]


@pytest.mark.parametrize("side", [768, 512, 256])
@pytest.mark.parametrize("size", [(4000, 3000), (1000, 700), (300, 200), (64, 2000), (8, 8), (512, 512)])
def test_a_limited_range_keeps_the_aspect_and_its_area(side, size):
    sizes = ReferenceSizes()
    width, height = sizes.limited(side).fit(*size)
    assert width % 16 == height % 16 == 0
    assert width * height <= max(side**2 * 1.1, 16 * sizes.longest_side)
    official = sizes.fit(*size)
    assert width * height <= max(official[0] * official[1], 16 * 16)
    assert sizes.limited(None) is sizes and sizes.limited(1024) == sizes
