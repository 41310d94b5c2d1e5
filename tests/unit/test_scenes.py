"""The synthetic scenes that training learns from, and the detector that reads their images back."""

import io
import math
import random
from collections import Counter
from dataclasses import replace

import numpy
import pytest
from PIL import Image, ImageDraw, ImageFilter

from internvl_u.finetune.maps import make_map
from training.data import captioned, captions, edits, hearts, questions, riddles, scenes
from training.data.scenes import Scene, Thing

pytest.importorskip("scipy", reason="the detector needs scipy, which ComfyUI brings")
from training.data import controls  # noqa: E402
from training.eval import detector  # noqa: E402

MAKERS = (scenes.random_scene, scenes.related_scene, scenes.counted_scene)
RED, BLUE = Thing("circle", "red", "medium", 0.28, 0.3), Thing("star", "blue", "small", 0.75, 0.7)
SCENE = Scene(96, 96, "beige", (RED, BLUE))


def make_scenes(count, seed):
    """Returns scenes of every kind, half of them off the grid."""
    rng = random.Random(seed)
    made = [MAKERS[i % 3](rng) for i in range(count)]
    return [scenes.jitter(rng, scene) if i % 2 else scene for i, scene in enumerate(made)]


@pytest.fixture(scope="module")
def drawn():
    return [(scene, scenes.render(scene)) for scene in make_scenes(600, 7)]


def wrong(scene, image):
    """Returns what a picture of the scene was read as, or None where that is right."""
    reading = detector.detect(image)
    placed = all(any(detector.is_thing(seen, thing, 0.03) for seen in reading.things) for thing in scene.things)
    if not (detector.matches_scene(reading, scene) and placed):
        seen = ", ".join(f"{thing.name} at {thing.x:.2f} {thing.y:.2f}" for thing in reading.things)
        return f"{scene}\n    read as {reading.background}: {seen}"


def assert_read(pairs, least):
    """Asserts that at least the share `least` of pairs of a scene and its picture is read right."""
    mistakes = [mistake for mistake in (wrong(*pair) for pair in pairs) if mistake]
    assert len(mistakes) <= (1 - least) * len(pairs), f"{len(mistakes)} of {len(pairs)}:\n" + "\n".join(mistakes)


def red_on_white(draw):
    """Returns a picture of 96 x 96 in which `draw(pen, colour, hole)` drew at four times the size."""
    image = Image.new("RGB", (384, 384), scenes.BACKGROUNDS["white"])
    draw(ImageDraw.Draw(image), scenes.COLOURS["red"], scenes.BACKGROUNDS["white"])
    return image.reduce(4)


def on_levels(change):
    """Returns a function of pictures that applies `change` to the levels [H, W, 3]."""

    def apply(image):
        changed = change(numpy.asarray(image, dtype=float))
        return Image.fromarray(changed.clip(0, 255).round().astype(numpy.uint8))

    return apply


# The scenes


@pytest.mark.parametrize("make", MAKERS)
def test_a_seed_gives_the_same_scene_and_picture(make):
    one, again, other = (make(random.Random(seed)) for seed in (3, 3, 4))
    assert one == again != other
    assert scenes.render(one).tobytes() == scenes.render(again).tobytes()
    assert scenes.render(one).size == (one.width, one.height)


def test_things_lie_in_the_picture_and_clear_of_each_other():
    made = make_scenes(600, 1)
    assert all(scenes.fits(scene) and 1 <= len(scene.things) <= 3 for scene in made)
    assert {(scene.width, scene.height) for scene in made} == set(scenes.IMAGE_SIZES)
    assert not scenes.fits(replace(SCENE, things=(RED, replace(BLUE, x=0.4, y=0.4))))
    assert not scenes.fits(replace(SCENE, things=(replace(RED, x=0.1),)))


def test_things_are_put_on_a_grid_of_the_shorter_side_and_loosened_off_it():
    rng = random.Random(6)
    for i in range(300):
        scene = MAKERS[i % 3](rng)
        sides = scene.width / min(scene.width, scene.height), scene.height / min(scene.width, scene.height)
        for thing in scene.things:
            steps = [place * side / scenes.GRID_STEP for place, side in zip((thing.x, thing.y), sides, strict=True)]
            assert all(abs(step - round(step)) < 1e-9 for step in steps)
    moved = 0
    for scene in make_scenes(300, 6)[::2]:
        loose = scenes.jitter(rng, scene)
        assert scenes.fits(loose)
        moved += loose != scene
        for before, after in zip(scene.things, loose.things, strict=True):
            assert replace(after, x=before.x, y=before.y) == before
        if len(scene.things) == 2 and (scenes.is_inside(scene, *scene.things[::-1])):
            assert scenes.is_inside(loose, *loose.things[::-1])
    assert moved > 140


@pytest.mark.parametrize("wished", ["left", "right", "above", "below", "inside"])
def test_two_things_lie_as_wished_and_are_seen_to(wished):
    rng = random.Random(2)
    for _ in range(20):
        scene = scenes.related_scene(rng, wished)
        one, other = reversed(scene.things) if wished == "inside" else scene.things
        assert scenes.relation(scene, one, other) == wished
        seen = detector.detect(scenes.render(scene)).things
        (a,), (b,) = ([thing for thing in seen if detector.is_thing(thing, named)] for named in (one, other))
        assert detector.relation(a, b) == wished, scene
        assert detector.is_inside(a, b) == (wished == "inside") and not detector.is_inside(b, a)


def test_what_is_added_without_a_place_goes_into_the_first_free_corner():
    scene = Scene(64, 64, "white", (Thing("circle", "red", "medium", 0.25, 0.5),))
    added = scenes.add_in_corner(scene, Thing("star", "blue", "small"))
    assert added.things[:1] == scene.things and (added.things[1].x, added.things[1].y) == (0.75, 0.25)
    full = Scene(64, 64, "white", (Thing("circle", "red", "large", 0.5, 0.5),))
    assert scenes.add_in_corner(full, Thing("star", "blue", "small")) is None


@pytest.mark.parametrize("count", [2, 3])
def test_counted_things_are_alike(count):
    (name,) = {thing.name for thing in scenes.counted_scene(random.Random(5), count).things}
    seen = detector.detect(scenes.render(scenes.counted_scene(random.Random(5), count))).things
    assert [thing.name for thing in seen] == [name] * count


def test_what_is_taught_later_is_in_nothing_that_training_makes():
    rng = random.Random(9)
    for scene in [*make_scenes(300, 9), *(scenes.any_scene(rng) for _ in range(100))]:
        assert all(thing.shape in scenes.SHAPES for thing in scene.things)
        made = [edit for edit in edits.edits_of(rng, scene)]
        said = [captions.caption(rng, scene), *(edit.instruction for edit in made)]
        said += [f"{question.text} {question.answer}" for question in questions.questions(rng, scene)]
        said += [riddles.random_riddle(rng).text]
        assert not [text for text in said if "heart" in text or captions.ZH_SHAPE["heart"] in text]
        assert all(thing.shape in scenes.SHAPES for edit in made for thing in edit.after.things)


def test_hearts_to_teach_come_in_all_colours_and_their_captions_say_so(tmp_path):
    rng = random.Random(10)
    made = hearts.heart_scenes(rng, 20)
    assert {(scene.things[0].x, scene.things[0].y) for scene in made} == {(0.5, 0.5)}
    assert len({scene.things[0].x for scene in hearts.heart_scenes(rng, 40, anywhere=True)}) == 3
    assert {scene.things[0].size for scene in made} == {"large"}
    assert {scene.things[0].size for scene in hearts.heart_scenes(rng, 40, anywhere=True)} == set(scenes.SIZES)
    for kind, least in ((scenes.COLOURS, 2), (scenes.BACKGROUNDS, 3)):
        seen = Counter(name for scene in made for name in (*vars(scene.things[0]).values(), scene.background))
        assert all(seen[name] >= least for name in kind)
    said = [hearts.heart_caption(rng, scene) for scene in made for _ in range(20)]
    unsaid = ("large", "big", "middle", "centre", "center")
    assert all("heart" in text and not any(word in text.split() for word in unsaid) for text in said)
    files = captioned.write_captioned(tmp_path / "new", ((scene, "a heart") for scene in made), "heart")
    assert len(list((tmp_path / "new").iterdir())) == 40 and files[0].with_suffix(".txt").read_text() == "a heart\n"
    assert Image.open(files[3]).tobytes() == scenes.render(made[3]).tobytes()
    with pytest.raises(FileExistsError, match="holds files already"):
        captioned.write_captioned(tmp_path / "new", (), "heart")


def test_captions_to_learn_control_from_do_not_say_where():
    rng = random.Random(11)
    words = [word for words in captions.PLACE_WORDS.values() for word in words] + list(captions.ZH_PLACE.values())
    for _ in range(300):
        scene = controls.control_scene(rng)
        assert not [word for word in words if word in captioned.without_a_place(rng, scene)]
        assert make_map(scenes.render(scene), "canny", controls.THRESHOLDS).getbbox() is not None, scene


# What is read


def test_drawn_scenes_are_read_back(drawn):
    assert_read(drawn, 0.995)


def test_hearts_are_read_among_the_others():
    rng = random.Random(8)
    made = [scenes.random_scene(rng, 1 + i % 3, None, scenes.ALL_SHAPES) for i in range(300)]
    made = [scenes.jitter(rng, scene) if i % 2 else scene for i, scene in enumerate(made)]
    assert sum(thing.shape == "heart" for scene in made for thing in scene.things) > 50
    assert_read([(scene, scenes.render(scene)) for scene in made], 0.995)


@pytest.mark.parametrize("shape", scenes.ALL_SHAPES)
@pytest.mark.parametrize("size", scenes.SIZES)
def test_a_thing_of_each_size_is_read_at_each_place(shape, size):
    for column, row in ((0.17, 0.83), (0.5, 0.5), (0.83, 0.17)):
        half = scenes.SIZES[size] / 2 + scenes.MARGIN
        thing = Thing(shape, "green", size, *(min(max(value, half), 1 - half) for value in (column, row)))
        (seen,) = detector.detect(scenes.render(Scene(64, 64, "black", (thing,)))).things
        assert detector.is_thing(seen, thing, 0.02) and detector.nearest_size(seen) == size
        places = [place for place in scenes.REGIONS if detector.is_in_region(seen, place)]
        assert scenes.region_of(thing) is None or places == [scenes.region_of(thing)]


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_each_colour_is_read_on_each_background(background):
    for colour in scenes.COLOURS:
        scene = Scene(64, 96, background, (Thing("ring", colour, "small", 0.6, 0.4),))
        assert wrong(scene, scenes.render(scene)) is None


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Image.open(file)


def scaled(factor):
    return lambda image: image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


def add_specks(image):
    image, rng = image.copy(), random.Random(image.tobytes())
    for _ in range(6):
        x, y = rng.randrange(image.width - 2), rng.randrange(image.height - 2)
        image.paste(tuple(rng.randrange(256) for _ in range(3)), (x, y, x + 2, y + rng.choice((1, 2))))
    return image


NOISE = numpy.random.default_rng(0)
HARM = {
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(0.8)),
    "brighter": on_levels(lambda values: values * 1.15),
    "more contrast": on_levels(lambda values: (values - 128) * 1.15 + 128),
    "other tint": on_levels(lambda values: values + NOISE.uniform(-30, 30, 3)),
    "JPEG": jpeg,
    "noisy": on_levels(lambda values: values + NOISE.normal(0, 8, values.shape)),
    "specks": add_specks,
    "twice the size": scaled(2),
    "three quarters": scaled(0.75),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_to_the_picture_is_forgiven(drawn, harm):
    # A blur of 0.8 pixels takes the tips off the smallest stars of the smallest pictures.
    suited = [(scene, image) for scene, image in drawn if harm != "blurred" or min(image.size) >= 96]
    assert_read([(scene, HARM[harm](image)) for scene, image in suited[:50]], 0.97)


# What is refused


CHANGES = {
    "recoloured": (replace(RED, colour="orange"), BLUE),
    "moved": (replace(RED, x=0.5), BLUE),
    "resized": (replace(RED, size="small"), BLUE),
    "replaced": (replace(RED, shape="square"), BLUE),
    "a ring of it": (replace(RED, shape="ring"), BLUE),
    "removed": (BLUE,),
    "one more": (RED, BLUE, replace(BLUE, x=0.25, y=0.8)),
    "swapped": (replace(RED, x=BLUE.x, y=BLUE.y), replace(BLUE, x=RED.x, y=RED.y)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    before = detector.detect(scenes.render(SCENE))
    after = detector.detect(scenes.render(replace(SCENE, things=CHANGES[change])))
    same_names = change in ("moved", "resized", "swapped")
    assert detector.matches_scene(before, SCENE) and detector.matches_scene(after, SCENE) == same_names
    assert detector.is_kept(before, before) and detector.is_kept(before, after) == (change == "one more")
    red, blue = before.things
    assert detector.is_kept(blue, after) == (change != "swapped") and detector.is_kept(red, after) == (
        change == "one more"
    )


def test_another_background_is_seen_and_the_things_are_kept():
    before = detector.detect(scenes.render(SCENE))
    for background in set(scenes.BACKGROUNDS) - {SCENE.background}:
        after = detector.detect(scenes.render(replace(SCENE, background=background)))
        assert not detector.matches_scene(after, SCENE) and detector.is_kept(before, after)


def test_of_two_alike_one_is_not_enough():
    one = detector.detect(scenes.render(replace(SCENE, things=(RED,))))
    twice = detector.DetectedScene(one.background, one.things * 2)
    assert detector.is_kept(one, twice) and not detector.is_kept(twice, one)


def polygon(*points):
    return lambda pen, colour, hole: pen.polygon([(4 * x, 4 * y) for x, y in points], fill=colour)


def star(tips, waist, turn=0.0):
    angles = [math.pi * i / tips + turn for i in range(2 * tips)]
    reach = [34 * (waist if i % 2 else 1) for i in range(2 * tips)]
    return polygon(*((48 + r * math.sin(a), 48 - r * math.cos(a)) for a, r in zip(angles, reach)))


def ellipse(*box):
    return lambda pen, colour, hole: pen.ellipse([4 * value for value in box], fill=colour)


def slice_of(start, end):
    return lambda pen, colour, hole: pen.pieslice((80, 80, 304, 304), start, end, fill=colour)


def disc_with_hole(*box):
    def draw(pen, colour, hole):
        pen.ellipse((80, 80, 304, 304), fill=colour)
        pen.ellipse([4 * value for value in box], fill=hole)

    return draw


def heart(half=False, turned=False, stretch=1.0):
    outline = scenes.HEART[: len(scenes.HEART) // 2] if half else scenes.HEART
    return polygon(*((48 + 28 * across, 48 + 28 * stretch * (-down if turned else down)) for across, down in outline))


CONE = [(100, 152), (284, 152), (192, 340)]
BLOBS = {
    "ellipse 2:1": ellipse(20, 34, 76, 62),
    "ellipse 1:1.4": ellipse(28, 20, 68, 76),
    "upper half of a disc": slice_of(180, 360),
    "left half of a disc": slice_of(90, 270),
    "three quarters of a disc": slice_of(0, 270),
    "disc with a bite": slice_of(30, 330),
    "small hole": disc_with_hole(40, 40, 56, 56),
    "hole at the side": disc_with_hole(50, 34, 74, 60),
    "oblong": polygon((20, 32), (76, 32), (76, 64), (20, 64)),
    "diamond": star(2, 1),
    "pentagon": star(5, math.cos(math.pi / 5)),
    "house": polygon((48, 19), (72, 43), (72, 77), (24, 77), (24, 43)),
    "slanted square": polygon((29, 24), (82, 24), (67, 72), (14, 72)),
    "triangle on its head": polygon((20, 24), (76, 24), (48, 72)),
    "right triangle": polygon((20, 20), (20, 76), (76, 76)),
    "narrow triangle": polygon((48, 10), (66, 86), (30, 86)),
    "star of four": star(4, 0.42),
    "star of six": star(6, 0.42),
    "star on its head": star(5, 0.42, math.pi),
    "L": polygon((20, 20), (38, 20), (38, 58), (76, 58), (76, 76), (20, 76)),
    "any corners": polygon((14, 40), (36, 22), (52, 44), (84, 30), (66, 58), (78, 80), (46, 62), (26, 74)),
    "heart on its head": heart(turned=True),
    "half a heart": heart(half=True),
    "wide heart": heart(stretch=0.6),
    "heart without its dent": polygon((20, 30), (76, 30), (76, 48), (48, 76), (20, 48)),
    "ice cream": lambda pen, c, _: (pen.pieslice((100, 60, 284, 244), 180, 360, c), pen.polygon(CONE, c)),
    "two overlapping": lambda pen, c, _: (pen.ellipse((60, 60, 210, 210), c), pen.rectangle((180, 180, 330, 330), c)),
}


@pytest.mark.parametrize("blob", BLOBS)
def test_a_shape_of_no_kind_is_unknown(blob):
    (seen,) = detector.detect(red_on_white(BLOBS[blob])).things
    assert (seen.shape, seen.colour) == ("unknown", "red")


def test_hardly_any_random_polygon_has_a_shape():
    rng, shapes = random.Random(3), Counter()
    for _ in range(60):
        angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(7))
        corners = [(48 + rng.uniform(12, 38) * math.cos(a), 48 + rng.uniform(12, 38) * math.sin(a)) for a in angles]
        shapes.update(thing.shape for thing in detector.detect(red_on_white(polygon(*corners))).things)
    assert shapes["unknown"] >= 0.95 * shapes.total()


@pytest.mark.parametrize(
    ("levels", "name"),
    [((128, 128, 128), "grey square"), ((128, 255, 128), "unknown square"), ((150, 150, 255), "unknown square")],
)
def test_a_thing_in_a_colour_of_no_thing_is_one_too_many(levels, name):
    image = scenes.render(SCENE)
    ImageDraw.Draw(image).rectangle((60, 10, 80, 30), fill=levels)
    reading = detector.detect(image)
    assert not detector.matches_scene(reading, SCENE)
    assert Counter(thing.name for thing in reading.things) == Counter(["red circle", "blue star", name])


@pytest.mark.parametrize("size", [(48, 48), (100, 80), (512, 64)])
def test_a_picture_of_something_else_has_no_known_thing(size):
    rng = numpy.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8))
    clouds = noise.resize([side // 16 for side in size]).resize(size, Image.Resampling.BICUBIC)
    for image in (noise, clouds, Image.new("RGB", size, "red"), Image.linear_gradient("L").resize(size)):
        assert not [thing for thing in detector.detect(image).things if "unknown" not in thing.name]
    assert detector.detect(Image.new("RGB", size, "white")) == detector.DetectedScene("white", ())
