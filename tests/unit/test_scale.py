"""benchmarks/scale.py: the simulator against closed forms, and what it counts."""

import math
import re
import statistics
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy
import pytest
from PIL import Image

from benchmarks import page, scale, scale_work
from benchmarks.scale_simulation import Cluster, expected, expected_attempts, most_workers, rates, simulate

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
FILES = {"PNG, soft, level 6": {"ms": 400.0, "MB": 1.4}, "sha256 of the sharp one": {"ms": 1.0, "MB": 2.7}}


@pytest.mark.parametrize(("workers", "rounds"), [(1, 40), (7, 6), (40, 1), (64, 1)])
def test_without_failures_a_run_takes_as_many_rounds_as_there_are_turns_for_each_worker(workers, rounds):
    cluster = Cluster(pictures=160, workers=workers, draw=2.0, batch=4, encode=0.5, latency=0.1)
    outcome = simulate(cluster)
    assert outcome.seconds == pytest.approx(rounds * (4 * 2.5 + 5 * 0.1))
    assert (outcome.made, outcome.failures, outcome.lost) == (40, 0, 0)
    assert outcome.drawing == pytest.approx(160 * 2.0)


def test_files_made_beside_the_drawing_cost_nothing_until_they_take_longer_than_it():
    for encode, seconds in ((0.5, 2.0), (3.0, 3.0)):
        cluster = Cluster(pictures=10, workers=1, draw=2.0, encode=encode, beside=True)
        assert simulate(cluster).seconds == pytest.approx(10 * seconds)


def test_workers_that_read_one_model_begin_one_after_the_other():
    # The first is ready after 4 s of reading and 3 s of its own, the others 4 s after each other.
    assert simulate(Cluster(pictures=4, workers=4, draw=1.0, reading=4.0, load=3.0)).seconds == 4 + 3 + 4
    assert (
        simulate(Cluster(pictures=8, workers=4, draw=5.0, reading=4.0)).seconds == 22
    )  # starts at 4 8 9 12 13 14 16 17
    many = Cluster(pictures=50_000, workers=100, draw=1.0, reading=4.0, load=3.0)
    assert expected(many) == pytest.approx(50_000 / 100 + 3 + 4 * 101 / 2)
    assert simulate(many).seconds == pytest.approx(expected(many), rel=0.01)
    # So few pictures are made before the last worker is ready that the late ones help nobody.
    few = Cluster(pictures=2000, workers=100, draw=1.0, reading=4.0)
    assert simulate(few).seconds == pytest.approx(expected(few), rel=0.02)
    assert expected(few) < 2000 / 100 + 4 * 101 / 2


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ({"dispatch": 0.05}, 0.05),
        ({"size": 1e6, "bandwidth": 1e7, "batch": 1}, 0.1),
        ({"puts": 40.0, "batch": 4}, 0.125),
    ],
)
def test_where_driver_or_storage_has_no_time_left_it_alone_tells_how_long_a_run_takes(limit, seconds):
    cluster = Cluster(pictures=8000, workers=500, draw=0.1, **limit)
    assert simulate(cluster).seconds == pytest.approx(cluster.tasks * seconds, rel=0.02)
    assert expected(cluster) == pytest.approx(cluster.tasks * seconds)
    assert cluster.workers > min(most_workers(cluster).values())
    outcome = simulate(cluster)
    assert max(outcome.driver, outcome.storage) / outcome.seconds > 0.98


def test_with_half_the_workers_that_the_driver_can_feed_it_is_half_busy():
    cluster = Cluster(pictures=20_000, workers=1, draw=1.0, dispatch=0.01)
    half = Cluster(pictures=20_000, workers=round(most_workers(cluster)["driver"] / 2), draw=1.0, dispatch=0.01)
    outcome = simulate(half)
    assert outcome.driver / outcome.seconds == pytest.approx(0.5, rel=0.05)
    assert outcome.seconds == pytest.approx(expected(half), rel=0.05)


@pytest.mark.parametrize(("work", "mean_life", "replace"), [(10.0, 1000.0, 60.0), (10.0, 20.0, 5.0), (10.0, 5.0, 0.0)])
def test_with_failures_a_run_takes_what_work_that_begins_anew_takes_on_average(work, mean_life, replace):
    cluster = Cluster(pictures=20_000, workers=10, draw=work, mean_life=mean_life, replace=replace)
    outcome = simulate(cluster)
    attempts = expected_attempts(work, mean_life, replace)
    assert outcome.seconds == pytest.approx(20_000 * attempts / 10, rel=0.05)
    assert outcome.made == 20_000
    # Each failure comes while a micro-batch is drawn, so they are as many as the expected tries that were in vain.
    assert outcome.failures == pytest.approx(20_000 * math.expm1(work / mean_life), rel=0.05)
    lost = 20_000 * (math.expm1(work / mean_life) * mean_life - work)
    assert outcome.lost == pytest.approx(lost, rel=0.06)


def test_what_a_rare_failure_costs_is_half_a_micro_batch_and_its_successor():
    work, mean_life, replace = 8.0, 1e5, 300.0
    assert expected_attempts(work, mean_life, replace) - work == pytest.approx(
        work / mean_life * (work / 2 + replace), rel=0.01
    )


def test_the_work_of_a_failed_worker_is_given_to_one_that_has_nothing_to_do():
    # One micro-batch, two workers: the one that has it may die often, the other one takes over and does not wait.
    cluster = Cluster(pictures=1, workers=2, draw=1.0, mean_life=1.0, replace=1e6)
    seconds = [simulate(cluster, seed).seconds for seed in range(200)]
    taken_over = [taken for taken in seconds if 1.0 < taken < 1e6]
    assert len(taken_over) > 40 and max(taken_over) < 2.0


def test_a_spread_is_drawn_from_and_the_same_seed_gives_the_same_run():
    cluster = Cluster(pictures=4000, workers=4, draw=1.0, spread=(0.5, 1.0, 2.5), mean_life=500.0, replace=20.0)
    first, again, other = simulate(cluster, 1), simulate(cluster, 1), simulate(cluster, 2)
    assert first == again and first != other
    assert first.drawing == pytest.approx(4000 * statistics.mean(cluster.spread), rel=0.05)
    assert first.seconds == pytest.approx(expected(cluster), rel=0.05)


def test_a_run_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 workers and 1 pictures; at least one of each expected"):
        simulate(Cluster(pictures=1, workers=0, draw=1.0))


def test_rates_without_shared_limits_are_those_of_the_workers():
    cluster = Cluster(pictures=10, workers=5, draw=2.0)
    assert rates(cluster) == {"worker": 0.5, "driver": math.inf, "storage": math.inf}
    assert most_workers(cluster) == {"driver": math.inf, "storage": math.inf}


def test_all_runs_of_the_page_are_near_their_closed_forms():
    base = scale.usual(FILES, [0.9, 1.0, 1.1], pictures=40_000)
    for name, cluster in scale.variants(base).items():
        for workers in (3, 30):
            one = replace(cluster, workers=workers)
            assert simulate(one).seconds == pytest.approx(expected(one), rel=0.06), (name, workers)


def test_runs_have_a_row_for_each_variant_and_number_of_workers_and_a_plot(tmp_path):
    base = scale.usual(FILES, [1.0], pictures=400)
    rows = scale.runs(base, workers=(1, 5))
    assert [row["workers"] for row in rows] == [1, 5] * len(scale.variants(base))
    assert all(0 < row["of ideal %"] <= 100 for row in rows)
    scale.draw_plot(rows, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").count("<rect") == len(rows)


def test_a_picture_is_its_steps_and_what_is_around_them_and_an_edit_looks_at_its_picture():
    small, large, edit = (scale_work.count_picture(*which) for which in (("t2i", 512), ("t2i", 1024), ("edit", 1024)))
    assert small["steps"] == pytest.approx(20 * 2.92, rel=0.01)
    assert large["decode"] > 4 * small["decode"] and large["text"] == small["text"]
    assert set(edit) - set(small) == {"look"} and edit["text"] > small["text"]
    for parts in (small, large, edit):
        assert parts["all"] == pytest.approx(sum(parts.values()) / 2)


def test_a_token_reads_the_released_language_model_but_for_its_table():
    assert scale_work.token_bytes() == pytest.approx(2 * 1.72e9, rel=0.01)


def test_stand_ins_differ_in_how_well_they_can_be_packed_and_stay_the_same_pictures():
    sizes = {}
    for name, picture in scale_work.make_pictures(256).items():
        data = scale_work.encoded(picture, 6)
        assert numpy.array_equal(numpy.asarray(Image.open(BytesIO(data))), numpy.asarray(picture))
        sizes[name] = len(data)
    assert sizes["flat"] < sizes["soft"] / 10 and sizes["soft"] < sizes["sharp"] < 256 * 256 * 3


def test_what_is_measured_has_what_a_run_is_made_of():
    rows = scale_work.file_rows(64, 1)
    assert {"PNG, soft, level 6", "sha256 of the sharp one", "write, fsync and rename it"} <= {
        row["what"] for row in rows
    }
    assert all(0 <= row["least"] <= row["ms"] <= row["most"] and row["MB"] > 0 for row in rows)
    assert scale.usual({row["what"]: row for row in rows}, [1.0]).size > 0


def test_the_page_shows_the_operations_and_hours_that_are_counted_today():
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in (("scale_counted", scale.counted()), ("scale_cards", scale.cards())):
        shown = re.search(rf"((\|[^\n]*\n)+)\n<!-- /{name} -->", text)[1]
        assert "TFLOP" in shown.splitlines()[0]
        here, today = (re.findall(r"\d+\.?\d*", one) for one in (shown, page.table(rows)))
        # Versions of torch count attention a little differently.
        assert [*map(float, here)] == pytest.approx([*map(float, today)], rel=0.03, abs=0.011)


def test_each_table_of_the_page_is_there_and_tells_its_command():
    text = PAGE.read_text(encoding="utf-8")
    for table in ("counted", "cards", "files", "runs"):
        shown = re.search(f"<!-- scale_{table} -->(.*)<!-- /scale_{table} -->", text, re.DOTALL)[1]
        assert f"`python -m benchmarks.scale {table}" in shown and shown.count("\n|") > 2
    assert (PAGE.parent / "plots" / "scale.svg").is_file() and "](plots/scale.svg)" in text
