"""Parity over architectures: a tiny random checkpoint of each, whole beside split over hosts; or why it can't be split.

    python -m benchmarks.architectures                     all; writes docs/reference/architectures.md
    python -m benchmarks.architectures olmoe gpt_oss       these only; writes nothing

Of each architecture greedy answers are compared token by token, and the logits of every step. Most run over hosts in
this process, with real connections, frames and expert calls over a network in memory; those in ``PROCESSES`` also over
host processes and sockets (``daaswarm bench parity``). What can't be split is refused while its manifest is made,
before there is anybody to send to; the number of calls that its hosts got is in the table too, and has to be 0.

Exit code 1 if an architecture's tokens differ, or one of ``MUST`` is not served. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import torch
import trio

from daaswarm.bench.parity import generate
from daaswarm.errors import DaaswarmError, ModelError, RemoteProtocolError, unwrap_groups
from daaswarm.experts.service import ExpertService, HostedModel
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.requester import Requester
from daaswarm.inference.sequence import Sampling
from daaswarm.inference.sequence import Sequence as Answer
from daaswarm.messages import Contact, ExpertCall, Reply, Request
from daaswarm.models.experts import load_experts
from daaswarm.models.sources import LocalModel, find_model, ignore_progress
from daaswarm.models.trunk import load_reference
from daaswarm.net.handshake import Identity
from daaswarm.net.memory import MemoryHub
from daaswarm.net.pool import ConnectionPool
from daaswarm.testing.checkpoints import make_tiny_checkpoint
from daaswarm.types import ExpertId, PeerId

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "architectures.md"
HOSTS = 3
TOKENS = 24
PROMPT_TOKENS = 17
ONE_S = 180.0  # of one architecture; the slowest take 10

MOE = (
    "afmoe", "aria", "axk1", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "diffusion_gemma", "dots1", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "gemma4",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "laguna", "lfm2_moe", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral", "muse_spark", "nemotron_h",
    "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe", "qwen3_vl_moe", "solar_open", "unlimited_ocr", "zaya",
)  # fmt: skip
"""What this release of transformers routes through its experts interface."""
DENSE = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2")
"""Families of gated FFNs, some with GELU or further norms."""
REFUSED = ("gpt2", "phi", "falcon", "bloom", "mamba", "bert", "t5", "opt")
"""No experts and no gated FFN of three linear layers: to be refused, with the reason."""
MUST = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss",
        "deepseek_v3", "nemotron_h", "jamba")  # fmt: skip
PROCESSES = ("llama", "olmoe", "gpt_oss", "deepseek_v3", "nemotron_h")


class Host:
    """Holds every ``HOSTS``-th expert of each layer."""

    def __init__(self, model: LocalModel, number: int) -> None:
        self.held = {layer: list(range(number, n, HOSTS)) for layer, n in model.layers.items() if number < n}
        self.service = ExpertService()
        self.calls = 0
        if self.held:
            layers: Any = load_experts(model, self.held, "f32")
            self.service.add(HostedModel(model.root, model.name, model.kind, model.hidden, "f32", layers))
        self.pool: ConnectionPool

    async def handle(
        self, peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Any]]:
        if not isinstance(message, ExpertCall):
            raise RemoteProtocolError("expert calls only", reject=False)
        self.calls += 1
        return await self.service.serve(peer, message, body, deadline_s)


@asynccontextmanager
async def open_hosts(model: LocalModel) -> AsyncIterator[tuple[list[Host], HostPlan, ConnectionPool]]:
    """Hosts that hold the model together, and a requester's network that is connected to them."""
    hub = MemoryHub()
    hosts = [Host(model, number) for number in range(HOSTS)]
    async with AsyncExitStack() as stack:
        for number, host in enumerate(hosts, start=1):
            opened = hub.open_node(make_identity(number), handler=host.handle)
            host.pool = await stack.enter_async_context(opened)
        asker = await stack.enter_async_context(
            hub.open_node(make_identity(0), handler=hosts[0].handle, dialable=False)
        )
        holders: dict[ExpertId, list[PeerId]] = {}
        contacts: dict[PeerId, Contact] = {}
        for host in hosts:
            assert host.pool.contact is not None
            contacts[host.pool.peer_id] = host.pool.contact
            await asker.connect(host.pool.contact)
            for layer, experts in host.held.items():
                for expert in experts:
                    holders[ExpertId(layer, expert)] = [host.pool.peer_id]
        yield hosts, HostPlan(model.root, "f32", model.layers, holders, contacts, kind=model.kind), asker


def make_identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number + 1]) * 32, bytes(32), "parity")


async def compare(folder: Path, cache: Path) -> dict[str, Any]:
    """One checkpoint, split beside whole.

    Raises:
        ModelError: it can't be split.
    """
    model = find_model(str(folder), cache)
    async with open_hosts(model) as (hosts, plan, asker), trio.open_nursery() as nursery:
        plan.check_complete(model.name)

        async def find_hosts(model: LocalModel, dtype: Any) -> HostPlan:
            return plan

        requester = Requester(asker, find_hosts, nursery, call_timeout_s=20.0)
        trunk = await requester.load(model, "f32", ignore_progress)
        reference = await trio.to_thread.run_sync(load_reference, model, "f32")
        ids: list[int] = torch.randint(3, 500, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
        want, want_logits, _ = await trio.to_thread.run_sync(generate, reference, ids, TOKENS)
        answer = Answer(
            trunk.model, model.name, list(ids), Sampling(max_tokens=TOKENS, min_tokens=TOKENS), keep_logits=True
        )
        await requester.complete(model, trunk, plan, answer)
        if answer.error is not None:
            raise answer.error
        worst = max(
            float((a.float() - b.float()).abs().nan_to_num(nan=float("inf")).max())
            for a, b in zip(want_logits, answer.logits, strict=True)
        )
        nursery.cancel_scope.cancel()
    return {
        "verdict": "served",
        "kind": model.kind,
        "layers": len(model.layers),
        "experts": max(model.layers.values()),
        "tokens": TOKENS,
        "tokens_identical": want == answer.token_ids,
        "max_abs_logit_diff": worst,
        "calls": sum(host.calls for host in hosts),
        "together": trunk.can_batch,
    }


def measure(architecture: str, work: Path) -> dict[str, Any]:
    """One architecture's row."""
    row: dict[str, Any] = {"architecture": architecture}
    try:
        folder = make_tiny_checkpoint(architecture, work / architecture)
    except Exception as error:  # noqa: BLE001 - of the shrunk configuration, or of a class without a generator
        return {**row, "verdict": "no checkpoint", "reason": first_line(error), "calls": 0}
    try:
        with unwrap_groups(RuntimeError, ValueError, TypeError, AttributeError):
            row |= trio.run(compare, folder, work / "cache")
    except ModelError as error:
        row |= {"verdict": "refused", "reason": error.message.replace(f"{folder}", architecture), "calls": 0}
    except (DaaswarmError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        row |= {"verdict": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
    if architecture in PROCESSES and row["verdict"] == "served":
        row["processes"] = run_processes(folder)
    return row


def run_processes(folder: Path) -> dict[str, Any]:
    """The same over two host processes."""
    options = ["--model", str(folder), "--hosts", "2", "--tokens", str(TOKENS), "--across", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "daaswarm", "bench", "parity", *options], capture_output=True, text=True, timeout=ONE_S
    )
    last: dict[str, Any] = json.loads((done.stdout.splitlines() or ["{}"])[-1])
    return {name: last.get(name) for name in ("tokens_identical", "max_abs_logit_diff", "hosts", "error")}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def write_page(rows: list[dict[str, Any]], versions: str) -> str:
    """The table as Markdown."""
    served = [row for row in rows if row["verdict"] == "served"]
    lines = [
        "# Architectures",
        "",
        "<!-- Written by `make parity`: change the program, not this file. -->",
        "",
        f"Tiny random checkpoints, f32, {versions}. Each answer is {TOKENS} greedy tokens to a prompt of "
        f"{PROMPT_TOKENS}, computed by transformers alone and with every layer split over {HOSTS} hosts. "
        "Logits of these checkpoints are of order 1.",
        "",
        f"## Served: {len(served)}",
        "",
        "| model_type | kind | split layers x experts or slices | tokens identical | max abs logit difference | over"
        " processes |",
        "|---|---|---|---|---|---|",
    ]
    for row in served:
        processes = row.get("processes")
        over = f"{processes['max_abs_logit_diff']:.1e}" if processes and not processes["error"] else ""
        lines.append(
            f"| {row['architecture']} | {row['kind']} | {row['layers']} x {row['experts']} | "
            f"{'yes' if row['tokens_identical'] else '**no**'} | {row['max_abs_logit_diff']:.1e} | {over} |"
        )
    others = [row for row in rows if row["verdict"] != "served"]
    lines += ["", f"## Not served: {len(others)}", ""]
    lines += [
        "Refused while the manifest is made, so before any host is asked. `no checkpoint`: the model can't generate"
        " text, or no tiny one could be made of it; nothing was tried.",
        "",
        "| model_type | | reason |",
        "|---|---|---|",
    ]
    lines += [f"| {r['architecture']} | {r['verdict']} | {r['reason'].replace('|', '/')} |" for r in others]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="model_types; all if none is named")
    names = parser.parse_args().architectures
    random.seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="daaswarm-") as work:
        for name in names or sorted({*MOE, *DENSE, *REFUSED}):
            rows.append(measure(name, Path(work)))
            print(json.dumps(rows[-1]), flush=True)
    import transformers

    if not names:
        PAGE.write_text(write_page(rows, f"torch {torch.__version__}, transformers {transformers.__version__}"))
    served = [row for row in rows if row["verdict"] == "served"]
    wrong = [row["architecture"] for row in served if not row["tokens_identical"]]
    wrong += [row["architecture"] for row in rows if row["architecture"] in MUST and row["verdict"] != "served"]
    wrong += [row["architecture"] for row in served if not row.get("processes", {}).get("tokens_identical", True)]
    worst = max((row["max_abs_logit_diff"] for row in served), default=0.0)
    print(json.dumps({"served": len(served), "of": len(rows), "max_abs_logit_diff": worst, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
