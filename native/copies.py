"""A second copy of the pack in one ComfyUI, as two ways of installing it leave behind: the first one stays whole."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Container
from pathlib import Path

ROOT = Path(__file__).parent.parent
_logger = logging.getLogger("internvl_u")


def is_second_copy(node_id: str, own: Container[type]) -> bool:
    """Returns whether another copy has brought the node of this id, which is none of `own`; says so in the log.

    What ComfyUI has noted of this copy's page is taken back: the page would run both copies' files.
    """
    host = sys.modules.get("nodes")  # ComfyUI's; there is no other way to ask it
    found = getattr(host, "NODE_CLASS_MAPPINGS", {}).get(node_id)
    if found is None or found in own:
        return False
    folders = getattr(host, "EXTENSION_WEB_DIRS", {})
    for name in [name for name, folder in folders.items() if folder == os.path.abspath(ROOT / "web")]:
        del folders[name]
    first = str(getattr(found, "RELATIVE_PYTHON_MODULE", "another folder")).rpartition(".")[2]
    _logger.warning(
        "InternVL-U is installed twice in custom_nodes: %s and %s. The nodes are those of %s. Remove one of the two "
        "folders, then restart ComfyUI.",
        first,
        ROOT.name,
        first,
    )
    return True
