"""At which sizes pictures are learned from, and which of them together."""

import math

import pytest
from pack.internvl_u.finetune.buckets import Buckets, batches, fill
from pack.internvl_u.finetune.examples import Example, Picture
from pack.internvl_u.images import ReferenceSizes, drawn_size
from PIL import Image

NANO, RELEASED = ReferenceSizes(64 * 64, 96 * 64, 128), ReferenceSizes()


def picture(tmp_path, name, size, colour="red"):
    Image.new("RGB", size, colour).save(tmp_path / name)
    return Picture(name, tmp_path / name)


@pytest.mark.parametrize("resolution", [None, 16, 32, 64, 100, 256, 512, 768, 1024, 1536, 4096])
@pytest.mark.parametrize("default, references", [((64, 64), NANO), ((512, 512), RELEASED)])
def test_buckets_are_sizes_that_are_drawn(resolution, default, references):
    buckets = Buckets.of_resolution(resolution, default, references)
    side = resolution // 16 * 16 if resolution else default[0]
    assert (side, side) in buckets.sizes and buckets.bucket(side, side) == buckets.bucket(1000, 1000) == (side, side)
    for width, height in buckets.sizes:
        assert drawn_size(width, height) == (width, height) and width * height <= side**2
        assert (height, width) in buckets.sizes and max(width, height) <= 3 * min(width, height)
    assert len(buckets.sizes) <= 40 and all(drawn_size(*size) == size for size in buckets.edited_sizes)


@pytest.mark.parametrize("width, height", [(1500, 1000), (1000, 1500), (1000, 1000), (1920, 1080), (1200, 1000)])
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("edited", [False, True])
def test_little_of_a_picture_is_cut_off(width, height, resolution, edited):
    bucket = Buckets.of_resolution(resolution, (512, 512), RELEASED).bucket(width, height, edited)
    assert abs(math.log(bucket[0] * height / (bucket[1] * width))) < 0.08


def test_the_longest_picture_has_a_bucket():
    buckets = Buckets.of_resolution(None, (512, 512), RELEASED)
    assert buckets.bucket(10, 200) == (288, 864) and buckets.bucket(200, 10) == (864, 288)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96), (128, 48)])
def test_an_edit_is_drawn_at_the_size_of_its_input_image(size):
    buckets = Buckets.of_resolution(None, (64, 64), NANO)
    assert NANO.fit(*size) == size == buckets.bucket(*size, edited=True)
    for released in (512, 768, 1024):
        buckets = Buckets.of_resolution(released, (512, 512), RELEASED)
        assert all(RELEASED.fit(*one) == one for one in buckets.edited_sizes) and len(buckets.edited_sizes) > 50


@pytest.mark.parametrize("resolution", [15, 4097, 64.5, "64", True])
def test_a_resolution_out_of_range_is_named(resolution):
    with pytest.raises(ValueError, match="resolution .* expected"):
        Buckets.of_resolution(resolution, (64, 64), NANO)


def test_pictures_fill_their_bucket_from_the_middle():
    image = Image.new("RGB", (300, 100), "blue")
    image.paste((255, 0, 0), (100, 0, 200, 100))
    assert fill(image, (50, 50)).crop((5, 0, 45, 50)).getcolors() == [(2000, (255, 0, 0))]
    assert fill(image, (300, 100)) is image


def test_views_of_one_thing_are_cut_alike_and_others_are_left_whole(tmp_path):
    size = (130, 64)
    image, before, other = (picture(tmp_path, f"{i}.png", one) for i, one in enumerate([size, (260, 128), (50, 70)]))
    marked = Image.new("RGB", size, "white")
    marked.paste((0, 0, 0), (32, 0, 98, 64))
    marked.save(tmp_path / "0.png")
    marked.resize((260, 128)).save(tmp_path / "1.png")
    buckets = Buckets.of_resolution(None, (64, 64), NANO)
    example = Example("x", "turn it", image, (before, other))
    placed = buckets.place(example)
    drawn, (one, two) = buckets.images(example)
    assert placed.cropped == (True, False) and drawn.size == one.size == placed.size and two.size == (50, 70)
    middle = placed.size[1] // 2
    edges = [[row.getpixel((x, middle))[0] for x in range(placed.size[0])] for row in (drawn, one)]
    assert max(abs(a - b) for a, b in zip(*edges)) < 40
    assert not placed.enlarged


def test_what_is_enlarged_is_told(tmp_path):
    examples = [
        Example("a", "x", picture(tmp_path, "a.png", (200, 200))),
        Example("b", "x", picture(tmp_path, "b.png", (60, 60))),
        Example("c", "x", picture(tmp_path, "c.png", (200, 200)), (picture(tmp_path, "d.png", (40, 40)),)),
        Example("d", "x", picture(tmp_path, "e.png", (300, 200))),
        Example("e", "q", answer="a"),
    ]
    buckets = Buckets.of_resolution(None, (64, 64), NANO)
    assert buckets.report(examples) == (
        "4 pictures in 2 buckets: 3 at 64 x 64, 1 at 80 x 48; 2 are smaller than their bucket and are enlarged"
    )
    assert (
        buckets.report(examples[:1]) == "1 pictures in 1 buckets: 1 at 64 x 64" and buckets.report(examples[4:]) == ""
    )


@pytest.mark.parametrize("count, batch", [(1, 1), (1, 4), (7, 3), (8, 2), (5, 16)])
def test_in_every_epoch_each_sample_comes_once(count, batch):
    shapes = [("a", "b", "c")[i % 3] for i in range(count)]
    chosen = batches(shapes, batch, seed=1)
    for epoch in range(4):
        steps = [chosen(epoch * chosen.epoch_steps + i) for i in range(chosen.epoch_steps)]
        assert all(len(step) == batch and len({shapes[i] for i in step}) == 1 for step in steps)
        seen = [i for step in steps for i in step]
        assert set(seen) == set(range(count))
        filled = sum(-shapes.count(one) % batch for one in set(shapes))
        assert len(seen) == count + filled


def test_batches_depend_on_seed_and_step_alone():
    shapes = ["a"] * 20
    one, two = batches(shapes, 2, seed=5), batches(shapes, 2, seed=5)
    backwards = [two(step) for step in reversed(range(40))][::-1]
    assert [one(step) for step in range(40)] == backwards
    assert [one(step) for step in range(10)] != [one(step) for step in range(10, 20)]
    assert [one(step) for step in range(10)] != [batches(shapes, 2, seed=6)(step) for step in range(10)]
    one(0).append(99)
    assert 99 not in one(0)


def test_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no samples found"):
        batches([], 1, 0)
    for wrong in (0, 4097, 1.5, True):
        with pytest.raises(ValueError, match="batch .* expected"):
            batches(["a"], wrong, 0)
