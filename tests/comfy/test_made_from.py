"""The shipped workflows, their cards and the help pages are made from today's nodes and graphs."""

import pytest
from pack.tools.workflows import made_from


@pytest.fixture(scope="module")
def today(server):
    return made_from.hashes(server.get("/object_info"))


@pytest.mark.parametrize("name", made_from.NAMES)
def test_it_was_made_from_the_nodes_and_graphs_as_they_are(today, name):
    what = "the page and the picture of web/docs" if name.startswith(made_from.OURS) else "the files of the workflow"
    advice = f"look through {what} {name} and make them anew: python dev.py nox -s workflows -- {name}"
    assert made_from.read()[name] == today[name], advice


def test_nothing_else_is_written_down():
    assert list(made_from.read()) == made_from.NAMES
