"""The nano model's scores, on a few cases of each task: well below what `training.eval.score` finds with many."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from training.eval import score

COUNT = 40
LEAST = {
    "one thing": 0.85,
    "two things, related": 0.75,
    "edit": 0.8,
    "question, one picture": 0.85,
    "question, two pictures": 0.8,
    "riddle, thinking": 0.75,
}


@pytest.mark.parametrize("task", LEAST)
def test_the_nano_model_is_as_good_as_it_says(task):
    outcomes = score.score(score.MODEL, [task], COUNT, workers=1)[task]
    wrong = [outcome for outcome in outcomes if not outcome.correct]
    assert score.accuracy(outcomes) >= LEAST[task], wrong


def test_riddles_need_thinking():
    outcomes = score.score(score.MODEL, ["riddle, not thinking"], COUNT, workers=1)["riddle, not thinking"]
    assert score.accuracy(outcomes) <= LEAST["riddle, thinking"] - 0.25


def test_a_score_counts_what_is_right():
    outcomes = [score.Outcome(right, "", "", "") for right in (True, True, False, True)]
    assert score.accuracy(outcomes) == 0.75
    lines = score.table({"one thing": outcomes}).splitlines()
    assert lines[-1] == "| one thing | 75.0% | 4 | 95% |"


def test_what_is_not_at_its_default_reaches_the_request(monkeypatch):
    drawn = []
    monkeypatch.setattr(score.Pipeline, "draw", lambda self, request, on_step=None: drawn.append(request))
    pipeline = score.Judged(score.MODEL, score.Changes(speed="fast", steps=7, unguided=True))
    pipeline.draw(score.ImageRequest("a red circle", seed=5))
    (request,) = drawn
    assert (request.prompt, request.seed, request.speed, request.steps) == ("a red circle", 5, "fast", 7)
    assert request.way.intervals.named() == dict.fromkeys(request.way.intervals.named(), 0.0)
