"""Text while it is generated: progress bar, live text on the node, cancelling. The progress of a download."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
from server import PromptServer

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

EVENT = "internvl_u.text"
CHAT_EVENT = "internvl_u.chat"
SECONDS_BETWEEN = 0.1
_logger = logging.getLogger("internvl_u")


class LiveText:
    """Called with each token: stops a cancelled job, moves the node's progress bar, and shows the text so far."""

    def __init__(self, hidden: HiddenHolder, total: int, decode: Callable[[list[int]], str]):
        self.hidden, self.decode = hidden, decode
        self.bar = comfy.utils.ProgressBar(total)
        self.shown = 0.0

    def __call__(self, ids: list[int]) -> None:
        """Takes all ids written so far.

        Raises:
            InterruptProcessingException: the job was cancelled.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(len(ids))
        now = time.monotonic()
        if now - self.shown >= SECONDS_BETWEEN:
            self.shown = now
            show(self.hidden, self.decode(ids))


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
    """Shows a text, and that it was `cut`, on a node in the browser that queued the job.

    `hidden` are the node's hidden inputs.

    The workflow's id goes with it, because node ids repeat in the workflows of other tabs. A node inside a loop is run
    as a copy with an id of its own: the text is for the node that the copy was made of.
    """
    server = PromptServer.instance
    if server.client_id is None:
        return  # a job that came from no page: the text would go to all of them
    node = _shown_node(hidden)
    workflow = _workflow_id(hidden.extra_pnginfo)
    server.send_sync(EVENT, {"node": node, "workflow": workflow, "text": text, "cut": cut}, server.client_id)


def show_chat(hidden: HiddenHolder, said: dict[str, Any]) -> None:
    """Tells the node, in the browser that queued the job, which turns came to its conversation; see `show`."""
    server = PromptServer.instance
    if server.client_id is not None:
        where = {"node": _shown_node(hidden), "workflow": _workflow_id(hidden.extra_pnginfo)}
        server.send_sync(CHAT_EVENT, where | said, server.client_id)


def show_note(hidden: HiddenHolder, text: str) -> None:
    """Shows a sentence below a node, the way of ComfyUI's own nodes, in the browser that queued the job."""
    server = PromptServer.instance
    if server.client_id is not None:
        server.send_progress_text(text, _shown_node(hidden), server.client_id)


def _shown_node(hidden: HiddenHolder) -> str:
    return hidden.dynprompt.get_display_node_id(hidden.unique_id) if hidden.dynprompt else hidden.unique_id


def _workflow_id(extra_pnginfo: object) -> object:
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    found = workflow.get("id") if isinstance(workflow, dict) else None
    return found if isinstance(found, str) else None
