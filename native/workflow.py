"""What the page's workflow tells of inputs that are connected there and have not come with the job."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .progress import show_note

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

_logger = logging.getLogger("internvl_u")
_SILENT = {2: "muted", 4: "bypassed"}
"""Modes of a node that is left out of the graph."""


def tell_unheard(hidden: HiddenHolder, empty: Collection[str]) -> None:
    """Says in the log and below the node which of its `empty` inputs are connected to a bypassed or muted node."""
    told = unheard(hidden, empty)
    if told:
        _logger.warning("InternVL-U, node %s: %s", hidden.unique_id, "; ".join(told))
        show_note(hidden, "\n".join(told))


def unheard(hidden: HiddenHolder, empty: Collection[str]) -> list[str]:
    """Returns a sentence for each of the `empty` inputs that is connected, to a node that is bypassed or muted.

    Nothing is told of a job that no page has sent, nor of a node inside a subgraph.
    """
    workflow = hidden.extra_pnginfo.get("workflow") if isinstance(hidden.extra_pnginfo, dict) else None
    try:
        return _unheard(workflow, str(hidden.unique_id), empty) if isinstance(workflow, dict) else []
    except (KeyError, IndexError, TypeError, AttributeError):
        return []  # another version of the page writes it another way


def _unheard(workflow: dict[str, Any], node_id: str, empty: Collection[str]) -> list[str]:
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    sources = dict(_source(link) for link in workflow["links"])
    told = []
    for one in nodes[node_id].get("inputs") or ():
        source = nodes.get(sources.get(one.get("link"), ""))
        how = _SILENT.get(source.get("mode", 0)) if source else None
        if source and how and one["name"] in empty:
            title = source.get("title") or source["type"]
            told.append(f"{one['name']} is connected, but {title} is {how}: nothing comes from there")
    return told


def _source(link: Any) -> tuple[int, str]:
    """Returns a link's number and the node that it comes from, in either form of a saved workflow."""
    if isinstance(link, dict):
        return link["id"], str(link["origin_id"])
    return link[0], str(link[1])
