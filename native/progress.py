"""Text while it is generated: progress bar, live text on the node, cancelling. The progress of a download."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from server import PromptServer

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

EVENT = "internvl_u.text"
CHAT_EVENT = "internvl_u.chat"
SECONDS_BETWEEN = 0.1
USUAL_TOKENS = 100
"""After so many tokens the bar is at half of its way, unless the limit is nearer: nobody knows where the text ends."""
TEXT, CUT, KEY = "internvl_u_text", "internvl_u_cut", "internvl_u_key"
"""Properties of a node in a workflow: the text that it has written, what is said of it, and the page's key of the
inputs that it was written from."""
_BAR = 1000
_logger = logging.getLogger("internvl_u")


class LiveText:
    """Called with each token: stops a cancelled job, moves the node's progress bar, and shows the text so far.

    Before the first one the node says that the prompt is being read, then how fast the text comes.
    """

    def __init__(self, hidden: HiddenHolder, total: int, decode: Callable[[list[int]], str]):
        self.hidden, self.total, self.decode = hidden, total, decode
        self.bar = comfy.utils.ProgressBar(_BAR)
        self.shown, self.first = 0.0, 0.0
        _send(hidden, None, state="reads the prompt ...")

    def __call__(self, ids: list[int]) -> None:
        """Takes all ids written so far.

        Raises:
            InterruptProcessingException: the job was cancelled.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(int(_BAR * share_written(len(ids), self.total)))
        now = time.monotonic()
        self.first = self.first or now
        if now - self.shown >= SECONDS_BETWEEN:
            self.shown = now
            _send(self.hidden, self.decode(ids), state=speed(len(ids), self.total, now - self.first))

    def end(self) -> None:
        """Fills the bar: the model has ended the text, wherever its limit was."""
        self.bar.update_absolute(_BAR)


def share_written(tokens: int, limit: int) -> float:
    """Returns how far the bar of a text is, in 0..1: always on its way, ever more slowly, and full at the limit."""
    return min(max(tokens / limit, tokens / (tokens + USUAL_TOKENS)), 1.0)


def speed(tokens: int, limit: int, seconds: float) -> str:
    """Returns tokens so far, tokens a second and the longest time left; `seconds` since the first of the tokens."""
    said = f"{tokens} of at most {limit} tokens"
    if tokens < 2 or seconds <= 0:
        return said
    rate = (tokens - 1) / seconds
    return f"{said}, {rate:.3g} a second, at most {_duration((limit - tokens) / rate)} left"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


class DownloadProgress:
    """Called with bytes and all bytes: stops a cancelled job, moves the node's progress bar, logs each tenth."""

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)
        self.shown, self.tenth = 0.0, -1

    def __call__(self, done: int, total: int) -> None:
        """Takes the bytes that are there and those of all files, 0 while they are not known.

        Raises:
            InterruptProcessingException: the job was cancelled.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not total:
            return
        if done * 10 // total > self.tenth:
            self.tenth = done * 10 // total
            _logger.info("InternVL-U: %.1f of %.1f GB downloaded", done / 1e9, total / 1e9)
        now = time.monotonic()
        if now - self.shown >= SECONDS_BETWEEN or done == total:
            self.shown = now
            self.bar.update_absolute(done, total)


def show(hidden: HiddenHolder, text: str, cut: str = "") -> None:
    """Shows a text, and that it was `cut`, on a node in the browser that queued the job; it is finished.

    `hidden` are the node's hidden inputs. The text goes into the workflow that the job was queued with as well, so that
    pictures saved from here on carry the text that they were drawn from.
    """
    node = _node_in(hidden.extra_pnginfo, _shown_node(hidden))
    key = ""
    if node is not None:
        properties = node.setdefault("properties", {})
        properties |= {TEXT: text, CUT: cut}
        key = str(properties.get(KEY, ""))
    _send(hidden, text, cut=cut, key=key, done=True)


def _send(hidden: HiddenHolder, text: str | None, **more: object) -> None:
    """Sends a text, None while there is none yet, to the node in the browser that queued the job.

    The workflow's id goes with it, because node ids repeat in the workflows of other tabs. A node inside a loop is run
    as a copy with an id of its own: the text is for the node that the copy was made of.
    """
    server = PromptServer.instance
    if server.client_id is None:
        return  # a job that came from no page: the text would go to all of them
    sent = {"node": _shown_node(hidden), "workflow": _workflow_id(hidden.extra_pnginfo), "text": text, "cut": ""}
    server.send_sync(EVENT, sent | more, server.client_id)


def show_chat(hidden: HiddenHolder, said: dict[str, Any]) -> None:
    """Tells the node, in the browser that queued the job, which turns came to its conversation; see `show`."""
    server = PromptServer.instance
    if server.client_id is not None:
        where = {"node": _shown_node(hidden), "workflow": _workflow_id(hidden.extra_pnginfo)}
        server.send_sync(CHAT_EVENT, where | said, server.client_id)


def show_note(hidden: HiddenHolder, text: str, log: bool = False) -> None:
    """Shows a sentence below a node, the way of ComfyUI's own nodes, in the browser that queued the job.

    With `log` it is in the log as well, as an information.
    """
    if log:
        _logger.info("InternVL-U, node %s: %s", hidden.unique_id, text)
    server = PromptServer.instance
    if server.client_id is not None:
        server.send_progress_text(text, _shown_node(hidden), server.client_id)


def show_note_on_current(text: str) -> None:
    """Shows a sentence below the node that runs now, for one whose result may not depend on which node it is.

    Hidden inputs, which say the same, make ComfyUI keep a result for each node of equal inputs: a model each.
    """
    server, running = PromptServer.instance, get_executing_context()
    if server.client_id is not None and running is not None:
        server.send_progress_text(text, running.node_id, server.client_id)


def _shown_node(hidden: HiddenHolder) -> str:
    return hidden.dynprompt.get_display_node_id(hidden.unique_id) if hidden.dynprompt else hidden.unique_id


def _workflow_id(extra_pnginfo: object) -> object:
    found = _workflow(extra_pnginfo).get("id")
    return found if isinstance(found, str) else None


def _workflow(extra_pnginfo: object) -> dict[str, Any]:
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    return workflow if isinstance(workflow, dict) else {}


def _node_in(extra_pnginfo: object, path: str) -> dict[str, Any] | None:
    """Returns a node of the workflow that a job was queued with; what a client has sent need not be one.

    In subgraphs an id is a path: 5:12 is node 12 in the subgraph that is the type of node 5.
    """
    workflow = _workflow(extra_pnginfo)
    definitions = workflow.get("definitions")
    subgraphs = list(_dicts(definitions.get("subgraphs") if isinstance(definitions, dict) else None))
    graph, found = workflow, None
    for name in str(path).split(":"):
        if found is not None:
            graph = next((one for one in subgraphs if one.get("id") == found.get("type")), {})
        found = next((one for one in _dicts(graph.get("nodes")) if str(one.get("id")) == name), None)
        if found is None:
            return None
    return found if isinstance(found, dict) and isinstance(found.get("properties", {}), dict) else None


def _dicts(values: object) -> Iterator[dict[str, Any]]:
    return (one for one in values if isinstance(one, dict)) if isinstance(values, list) else iter(())
