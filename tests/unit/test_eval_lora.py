"""The judge of LoRAs: what it asks, and what it finds of the nano model without one."""

import random

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from training.data import hearts, scenes
from training.data.scenes import Scene, Thing
from training.eval import lora, score


class Painter:
    """Draws scenes that it is given in place of a model's pictures."""

    def __init__(self, change=lambda scene: scene):
        self.change, self.asked = change, []

    def draw(self, request):
        self.asked.append(request)
        return scenes.render(self.change(self.scene))


def judged(monkeypatch, task, maker, change, count=20):
    painter = Painter(change)
    made = getattr(lora, maker)

    def remember(*arguments, **options):
        result = made(*arguments, **options)
        painter.scene = result[0] if isinstance(result, list) else result
        return result

    monkeypatch.setattr(lora, maker, remember)
    return painter, [lora.TAUGHT[task](painter, random.Random(number)) for number in range(count)]


def with_thing(**changes):
    def change(scene):
        (thing,) = scene.things
        return Scene(scene.width, scene.height, scene.background, (Thing(**vars(thing) | changes),))

    return change


@pytest.mark.parametrize(
    "change, correct, shown",
    [
        (lambda scene: scene, True, True),
        (lambda scene: Scene(64, 64, "white" if scene.background != "white" else "black", scene.things), True, False),
        (with_thing(shape="circle"), False, False),
        (lambda scene: Scene(64, 64, scene.background, ()), False, False),
    ],
)
def test_a_heart_must_be_alone_and_in_its_colour(monkeypatch, change, correct, shown):
    painter, found = judged(monkeypatch, "heart", "heart_scenes", change)
    assert {(one.correct, one.shown) for one in found} == {(correct, shown)}
    assert all("heart" in request.prompt and not request.images for request in painter.asked)


@pytest.mark.parametrize(
    "change, correct, shown",
    [
        (lambda scene: scene, True, True),
        (lambda scene: with_thing(x=scene.things[0].x - 0.1)(scene), True, True),
        (lambda scene: with_thing(x=(scene.things[0].x + 0.5) % 1)(scene), False, None),
        (with_thing(shape="cross", size="small", x=0.5, y=0.5), False, None),
    ],
)
def test_control_asks_for_the_thing_within_half_a_step_of_its_edges(monkeypatch, change, correct, shown):
    painter, found = judged(monkeypatch, "control", "control_scene", change)
    right = sum(one.correct for one in found)
    assert right >= 19 if correct else right <= 5  # a scene may have been as changed
    assert shown is None or sum(one.shown for one in found) >= 19
    assert all(request.prompt.startswith("Draw from this edge map: ") for request in painter.asked)
    assert all(request.images[0].size == (64, 64) for request in painter.asked)


def test_the_nano_model_knows_no_heart_and_its_old_cases_are_those_of_its_score():
    assert not any(one.correct for one in lora.judge(score.MODEL, (), "heart", 10, workers=1))
    old = lora.judge(score.MODEL, (), "old", 5, workers=1)
    known = score.score(score.MODEL, ["one thing"], 5, workers=1)["one thing"]
    assert [(one.correct, one.asked) for one in old] == [(one.correct, one.asked) for one in known]


def test_the_word_is_one_that_training_never_says():
    assert hearts.WORD in scenes.TAUGHT_SHAPES and hearts.WORD not in scenes.SHAPES
