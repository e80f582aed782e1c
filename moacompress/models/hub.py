"""Names on a model hub: without a network one that is in the cache loads, and any other fails at once."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from moacompress.core.errors import ModelError
from moacompress.models.weight_files import INDEX_FILE

SECONDS = 3.0
"""How long the hub may take to answer a connection."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(source: str) -> bool:
    """Whether a text can be the name of a model on a hub, `owner/name` or `name`, and no path."""
    return bool(_HUB_NAME.fullmatch(source)) and not source.startswith(".")


def hub_arguments(name: str) -> dict[str, Any]:
    """Returns the arguments that a name on the hub is loaded with: of its cached files alone where the hub cannot be reached.

    `HF_HUB_OFFLINE`, `HF_HOME` and a proxy are respected.

    Raises:
        ModelError: it is not in the cache, and the hub is not to be asked or cannot be reached.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE and can_reach(constants.ENDPOINT):
        return {}
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub would give
        cached = None
    if isinstance(cached, str):
        return {"local_files_only": True}
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
    raise ModelError(
        f"there is no folder {name}, {why}, and the cache in {constants.HF_HUB_CACHE} does not have it; give a model folder "
        "or a .gguf file, or connect to the network"
    )


def index_of(name: str, arguments: dict[str, Any]) -> Path | None:
    """Returns the index of a hub name's weights, fetched where `hub_arguments` allow it; None for weights in one file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    only_local = bool(arguments.get("local_files_only", False))
    try:
        return Path(hf_hub_download(name, INDEX_FILE, local_files_only=only_local))
    except EntryNotFoundError:
        return None


def can_reach(endpoint: str) -> bool:
    """Whether a server takes a connection within `SECONDS`; that of a proxy is not tried, and is taken to work."""
    address = urlsplit(endpoint)
    if getproxies().get(address.scheme):
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=SECONDS):
            return True
    except OSError:
        return False
