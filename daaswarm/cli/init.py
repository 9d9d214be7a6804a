"""``daaswarm init``: make the data directory and the identity."""

from __future__ import annotations

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output


def init(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Make this node's folder and its Ed25519 identity. Running it again changes nothing.

    Example: daaswarm init --data-dir ~/swarm
    """
    from daaswarm.core.signing import get_peer_id

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    existed = folder.has_key()
    peer_id = get_peer_id(folder.load_key().verify_key.encode())
    read_config(folder)
    output.json(
        {"peer_id": peer_id, "data_dir": str(folder.path), "config": str(folder.config_path), "created": not existed}
    )
    output.message(f"{'This node is' if existed else 'Made a new identity:'} {peer_id}")
    output.message(f"Folder   {folder.path}")
    output.message(f"Settings {folder.config_path} (see daaswarm config --help)")
    output.message('Next     daaswarm join, or daaswarm infer "What is the capital of France?"')
