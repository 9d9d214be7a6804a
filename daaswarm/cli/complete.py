"""What Tab offers for the words of a command line: read from the disk in a moment, without torch or a node.

Whoever presses Tab must never see an error, so what can't be read offers nothing.
"""

from __future__ import annotations

from pathlib import Path

import typer

from daaswarm.cli.options import open_data_dir
from daaswarm.config import get_cache_dir
from daaswarm.errors import DaaswarmError
from daaswarm.types import CODECS, DTYPES


def complete_peers(context: typer.Context, incomplete: str) -> list[str]:
    """The peers that this node met, by its database."""
    from daaswarm.store.database import read_database

    folder = open_data_dir(_get_path(context, "data_dir"))
    try:
        with read_database(folder.database_path) as database:
            peers = [] if database is None else [peer.peer_id for peer in database.get_peers()]
    except (DaaswarmError, OSError):
        return []
    return sorted(peer for peer in peers if peer.startswith(incomplete))


def complete_swarms(context: typer.Context, incomplete: str) -> list[str]:
    """The private swarms whose keys are in the data directory."""
    from daaswarm.store.swarm_keys import list_stored

    try:
        swarms = list_stored(open_data_dir(_get_path(context, "data_dir")))
    except DaaswarmError:
        return []
    return [swarm for swarm in swarms if swarm.startswith(incomplete)]


def complete_layers(context: typer.Context, incomplete: str) -> list[str]:
    """All layers of the model that was named, and its two halves."""
    from daaswarm.models.manifest_file import MANIFEST_NAME, load_manifest
    from daaswarm.models.sources import list_models

    words = [context.params.get("model"), *context.args]  # in args while the option before Tab has no value
    name = str(next((word for word in words if word), ""))
    try:
        folders = [model.folder for model in list_models(get_cache_dir()) if model.name == name]
        layers = sorted(load_manifest((folders or [Path(name)])[0] / MANIFEST_NAME).layers)
    except (DaaswarmError, OSError):
        return []
    first, last = layers[0], layers[-1]
    middle = layers[len(layers) // 2]
    offered = [f"{first}-{last}", f"{first}-{middle - 1}", f"{middle}-{last}"] if first < middle else [f"{first}"]
    return [layer for layer in offered if layer.startswith(incomplete)]


def complete_dtypes(incomplete: str) -> list[str]:
    return [dtype for dtype in DTYPES if dtype.startswith(incomplete)]


def complete_verify(incomplete: str) -> list[str]:
    return [mode for mode in ("off", "sample", "sample=0.1", "every", "twin") if mode.startswith(incomplete)]


def complete_codecs(incomplete: str) -> list[str]:
    return [codec for codec in ("none", *CODECS) if codec.startswith(incomplete)]


def complete_devices(incomplete: str) -> list[str]:
    return [device for device in ("cpu", "cuda", "auto") if device.startswith(incomplete)]


def _get_path(context: typer.Context, name: str) -> Path | None:
    value = context.params.get(name)
    return None if value is None else Path(value)
