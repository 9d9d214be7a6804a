"""``daaswarm model``: the models on this machine, and how they get here."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import trio
import typer

from daaswarm.cli.complete import complete_dtypes
from daaswarm.cli.expert import ask_swarm
from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.options import BootstrapOption, DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running, run_to_end, show
from daaswarm.config import Config, get_cache_dir
from daaswarm.errors import EXIT_FAILED, ConfigError, ModelError, StorageError
from daaswarm.models.library import Kept, forget_folder, list_kept, locate_folder
from daaswarm.models.sources import DEFAULT_MODEL, LocalModel, find_model
from daaswarm.store.data_dir import DataDir
from daaswarm.systems import expand_user
from daaswarm.types import DTYPES, Dtype, format_bytes, parse_bytes

ROOT = re.compile(r"[0-9a-f]{64}")
HOSTS = 3  # of model info, unless another number is asked for: what infer starts on one machine

app = typer.Typer(no_args_is_help=True, help="Models: which are here, what they take, and how to get one.")

T = TypeVar("T")
ModelArgument = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_models,
        help="The default model's name, a folder in Hugging Face layout, a GGUF file, or a name or root of model list.",
    ),
]


@app.command("list")
def list_models(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the models in the cache, and those in other folders that this node used.

    Example: daaswarm model list
    """
    output = Output(as_json=as_json)
    kept = list_kept(get_cache_dir()) + read_remembered(open_data_dir(data_dir))
    output.json({"cache": str(get_cache_dir()), "models": [model._asdict() for model in kept]})
    if as_json:
        return
    if not kept:
        output.message("no models here: daaswarm model pull SOURCE gets one, and infer fetches the default model")
        return
    rows = [
        (
            model.name,
            model.kind,
            model.root[:16],
            format_bytes(model.bytes) if model.bytes else "",
            model.dtype,
            model.folder,
            model.note,
        )
        for model in kept
    ]
    output.table(["model", "kind", "root", "size", "dtype", "where", ""], rows)


@app.command()
def info(
    model: ModelArgument,
    dtype: Annotated[
        str, typer.Option("--dtype", autocompletion=complete_dtypes, help="Computed in f32, bf16 or f16.")
    ] = "f32",
    hosts: Annotated[int, typer.Option("--hosts", min=1, max=4096, help="Hosts that share the experts.")] = HOSTS,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Of each host: says how many are needed.")
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is and what it takes: of a requester, of each host, of one expert. Fetches nothing.

    Example: daaswarm model info smollm2-135m-instruct --hosts 3 --dtype bf16
    """
    output = Output(as_json=as_json)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    memory_bytes = parse_bytes(memory, option="--memory") if memory is not None else None
    folder = open_data_dir(data_dir)
    kept = {m.name: m for m in reversed(read_remembered(folder))}
    known = kept.get(model)

    def describe(progress: Any) -> dict[str, Any]:
        from daaswarm.models.describing import describe_model

        path = locate_folder(known.folder if known is not None else model, get_cache_dir(), progress)
        chosen: Dtype = dtype  # type: ignore[assignment]
        return describe_model(path, get_cache_dir(), dtype=chosen, hosts=hosts, memory_bytes=memory_bytes)

    found = work(describe, read_config(folder), output)
    output.json({"model": model, **found})
    if not as_json:
        output.rows(get_info_rows(found))


@app.command()
def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a GGUF file, the default's name, hf:owner/name[@revision], or a model's root (64 hex"
            " digits) to have it from peers that host it."
        ),
    ] = DEFAULT_MODEL,
    link: Annotated[
        bool, typer.Option("--link", help="Of a folder: make hard links, not copies. Then never change its files.")
    ] = False,
    bootstrap: BootstrapOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a model in the cache, whole and verified. What is stopped leaves no model; from peers, it goes on later.

    Example: daaswarm model pull 4113fefdde69…c7 --bootstrap /ip4/…/tcp/…/p2p/…
    """
    from daaswarm.models.fetching import HUB, fetch_model, parse_hub_name

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder, bootstrap=bootstrap)
    if ROOT.fullmatch(source):
        if link:
            raise ConfigError("--link goes with a folder", hint="leave it away")
        found: dict[str, Any] = {}

        async def run() -> None:
            params = {"root": source, "bootstrap": bootstrap or []}
            found.update(await ask_swarm(folder, config, "pull", params, output))

        run_to_end(run, config, output)
        output.json(found)
        output.result(f"{found['model']}  {found['folder']}")
        return
    if bootstrap:
        raise ConfigError("--bootstrap goes with a model's root", hint="a root has 64 hex digits: see model list")
    if source.startswith(HUB):
        parse_hub_name(source)
    show_prepared(source, lambda progress: fetch_model(source, get_cache_dir(), progress, link=link), config, output)


@app.command()
def prepare(
    model: ModelArgument,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Also make the secrets by which infer checks hosts without having their weights."),
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", autocompletion=complete_dtypes, help="In which hosts that are checked compute.")
    ] = "f32",
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hash or convert a model ahead of time, so that hosting and asking begin at once.

    Example: daaswarm model prepare ./Qwen2.5-0.5B-Instruct-Q8_0.gguf --audit
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    config, output = read_config(open_data_dir(data_dir)), Output(as_json=as_json)
    if not audit:
        show_prepared(model, lambda progress: find_model(model, get_cache_dir(), progress), config, output)
        return

    def make(progress: Any) -> tuple[LocalModel, Path, int]:
        from daaswarm.models.secrets import get_path, make_secrets

        found = find_model(model, get_cache_dir(), progress)
        chosen: Dtype = dtype  # type: ignore[assignment]
        path = get_path(get_cache_dir(), found.root, chosen)
        return found, path, make_secrets(found, chosen, path, progress)

    found, path, nbytes = work(make, config, output)
    output.json({"model": found.name, "model_root": found.root, "dtype": dtype, "path": str(path), "bytes": nbytes})
    output.result(f"{found.name}  {dtype}  {path}")
    output.message(f"hosts of {found.name} in {dtype} can be checked now; the file ({format_bytes(nbytes)}) is secret")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(autocompletion=complete_models, help="Name or root of a model in the cache.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a model from the cache. Asks first; what the running node serves stays. Other folders are never touched.

    Example: daaswarm model remove smollm2-135m-instruct --yes
    """
    output = Output(as_json=as_json)
    folder, cache = open_data_dir(data_dir), get_cache_dir()
    # A model that can't be read has no root: an empty name must not find it.
    kept = next((m for m in list_kept(cache) if name and name in (m.name, m.root)), None)
    if kept is None:
        elsewhere = next((m for m in read_remembered(folder) if name in (m.name, m.root, m.folder)), None)
        if elsewhere is not None:
            raise ModelError(f"{name} lies in {elsewhere.folder}, not in the cache", hint="remove the folder yourself")
        raise ModelError(f"{name} is not in the cache {cache}", hint="see daaswarm model list")
    check_not_served(kept, folder, output)
    if not yes and not ask(kept, as_json):
        output.message("nothing was removed")
        raise typer.Exit(EXIT_FAILED)
    forget_folder(Path(kept.folder))
    output.json({"model": kept.name, "model_root": kept.root, "folder": kept.folder, "bytes": kept.bytes})
    output.message(f"removed {kept.name}: {format_bytes(kept.bytes)}")


# -- in common ----------------------------------------------------------------------------------------------------


def work(task: Callable[[Any], T], config: Config, output: Output) -> T:
    """Run something that blocks, with progress. Ctrl-C ends the command at once."""
    from daaswarm.node.reporting import make_progress

    results: list[T] = []

    async def run() -> None:
        progress = make_progress(partial(_show, output))
        results.append(await trio.to_thread.run_sync(task, progress, abandon_on_cancel=True))

    run_to_end(run, config, output)
    return results[0]


def show_prepared(source: str, task: Callable[[Any], LocalModel], config: Config, output: Output) -> None:
    """Run what gets a model ready, and say what came of it."""
    from daaswarm.models.library import describe_kept

    path = expand_user(source)
    types: dict[str, int] = {}
    if path.suffix.lower() == ".gguf" and path.is_file():
        from daaswarm.models.gguf_header import count_types

        types = count_types(path)
    began = time.monotonic()
    model = work(task, config, output)
    kept = describe_kept(model.name, model.folder, model.manifest)
    result: dict[str, Any] = {**kept._asdict(), "model": model.name, "model_root": model.root}
    result["seconds"] = round(time.monotonic() - began, 3)
    if types:
        result |= {"source_types": types, "dequantised": any(name not in ("F32", "F16", "BF16") for name in types)}
        stored = ", ".join(f"{count} tensors of {name}" for name, count in types.items())
        output.message(f"the GGUF file has {stored}; all became {kept.dtype} (what quantising lost stays lost)")
    output.json(result)
    output.result(f"{model.name}  {model.root}  {kept.folder}")


def read_remembered(folder: DataDir) -> list[Kept]:
    """Models in folders of the user's own that this node used."""
    from daaswarm.store.database import read_database

    try:
        with read_database(folder.database_path) as database:
            records = [] if database is None else database.get_models()
    except StorageError:
        return []  # the next node sets the file aside, and says so
    return [
        Kept(r.name, r.kind, r.model_root, 0, "", r.folder, False, "" if Path(r.folder).is_dir() else "gone")
        for r in records
    ]


def check_not_served(kept: Kept, folder: DataDir, output: Output) -> None:
    """Raises:
    ConfigError: the node that runs here serves it.
    """
    if not is_node_running(folder):
        return
    found: dict[str, Any] = {}

    async def run() -> None:
        found.update(await attach(folder, "experts", {}, partial(_show, output)))

    run_to_end(run, read_config(folder), output)
    if kept.root and any(model["root"] == kept.root for model in found["hosted"]):
        raise ConfigError(
            f"the node that runs on {folder.path} serves {kept.name}",
            hint=f"daaswarm expert remove {kept.name}, or stop its host-expert, first",
        )


def ask(kept: Kept, as_json: bool) -> bool:
    """Whether the user says yes.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "model remove removes files, and there is no terminal to ask on",
            hint=f"say daaswarm model remove {locate_model(kept.name)} --yes",
        )
    sys.stderr.write(f"Remove {kept.folder} ({format_bytes(kept.bytes)})? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def get_info_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures for people."""
    rows = [
        ("architecture", found["architecture"]),
        ("folder", found["folder"]),
        ("stored", f"{format_bytes(found['bytes'])} ({', '.join(found['stored_dtypes'])})"),
        ("context", f"{found['context']} tokens" if found["context"] else "not said"),
    ]
    if not found["servable"]:
        return [*rows, ("can be served", f"no: {found['reason']}")]
    noun = "experts" if found["kind"] == "moe" else "slices"
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in found["layers"]:
        groups.setdefault((layer["experts"], layer["expert_bytes"]["f32"]), []).append(layer["layer"])
    from daaswarm.types import format_range

    for (count, _), numbers in groups.items():
        sizes = next(layer["expert_bytes"] for layer in found["layers"] if layer["layer"] == numbers[0])
        each = ", ".join(f"{format_bytes(size)} {name}" for name, size in sizes.items())
        rows.append((f"layers {format_range(numbers)}", f"{count} {noun} each, {each} a piece"))
    rows += [
        ("root", found["root"] or "not prepared yet: daaswarm model prepare"),
        ("can be served", "yes"),
        ("requester", ", ".join(f"{format_bytes(n)} {name}" for name, n in found["requester_bytes"].items())),
        ("all " + noun, ", ".join(f"{format_bytes(n)} {name}" for name, n in found["experts_bytes"].items())),
        (f"each of {found['hosts']} hosts", f"{format_bytes(found['host_bytes'])} {found['dtype']}"),
    ]
    if "memory_bytes" in found:
        needed = found["hosts_needed"]
        text = f"{needed} with {format_bytes(found['memory_bytes'])} each, in {found['dtype']}"
        rows.append(("hosts needed", text if needed is not None else "one alone is too large for that memory"))
    return rows


async def _show(output: Output, event: dict[str, Any]) -> None:
    show(event, output)
