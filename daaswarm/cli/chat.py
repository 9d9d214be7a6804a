"""The chat of ``daaswarm infer`` without a prompt: a conversation with a model, and commands that begin with ``/``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Protocol

import trio

from daaswarm.api.control import Emit
from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.output import WAITING, Output, describe_retries
from daaswarm.cli.run import attach, is_node_running, show
from daaswarm.config import Config
from daaswarm.errors import ConfigError, DaaswarmError, Interrupted, unwrap_groups
from daaswarm.store.data_dir import DataDir
from daaswarm.systems import expand_user
from daaswarm.types import format_bytes

# A method of a node, by name: see SwarmCoordinator.control.
Call = Callable[[str, dict[str, Any], Emit], Awaitable[dict[str, Any]]]


class Reader(Protocol):
    """Where questions come from: :class:`daaswarm.cli.line_reader.LineReader`."""

    async def read(self) -> str: ...


@asynccontextmanager
async def open_caller(folder: DataDir, config: Config, params: dict[str, Any], *, serve: bool) -> AsyncIterator[Call]:
    """The node that runs on ``folder``, or one of the chat's own until the block ends."""
    if is_node_running(folder):
        yield partial(attach, folder)
        return
    from daaswarm.node.life import open_asker

    async with open_asker(folder, config, embedded=params["embedded"] is not None, serve=serve) as node:
        params["bootstrap"] = config.network.bootstrap
        yield node.control


class Chat:
    """One conversation.

    Args:
        call: reaches the node.
        params: those of an ``infer`` request without its prompt.
        reader: gives the questions.
    """

    def __init__(self, call: Call, params: dict[str, Any], output: Output, reader: Reader) -> None:
        self.history: list[dict[str, str]] = []
        self.last: dict[str, Any] | None = None  # the result of the last answer
        self._call = call
        self._params = params
        self._output = output
        self._reader = reader
        self._embedded: int | None = None  # hosts that this chat started
        self._answering: trio.CancelScope | None = None
        self._has_warned = False  # one Ctrl-C at the prompt came before this one
        self._written: list[str] = []
        self._holding: trio.CancelScope | None = None

    async def run(self) -> None:
        """Until the person leaves.

        Raises:
            Interrupted: by Ctrl-C, twice.
            DaaswarmError: the first model can't be asked, or the node has stopped.
        """
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                await nursery.start(self._hold, self._params)
                self._say(f"chat with {self._params['model']}: /help shows the commands, Ctrl-D leaves")
                while await self._take_turn(nursery):
                    pass
                nursery.cancel_scope.cancel()

    def interrupt(self) -> bool:
        """Ctrl-C: stop the answer that is being written. ``False`` where there is none, or it is stopping already."""
        if self._answering is None or self._answering.cancel_called:
            return False
        self._answering.cancel()
        return True

    @contextmanager
    def _stoppable(self) -> Iterator[trio.CancelScope]:
        """What :meth:`interrupt` ends, as long as it lasts."""
        with trio.CancelScope() as scope:
            self._answering = scope
            try:
                yield scope
            finally:
                self._answering = None

    async def _take_turn(self, nursery: trio.Nursery) -> bool:
        try:
            text = await self._reader.read()
        except EOFError:
            return False
        except KeyboardInterrupt:
            if self._has_warned:
                raise Interrupted("the chat was left") from None
            self._has_warned = True
            self._say("Ctrl-C again, or Ctrl-D, leaves")
            return True
        self._has_warned = False
        if not text.strip():
            return True
        if not text.startswith("/"):
            await self._ask(text)
            return True
        word, _, rest = text.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        try:
            if word == "/model" and rest.strip():
                await self._change_model(rest.strip(), nursery)
            else:
                await self._obey(word, rest.strip())
        except DaaswarmError as error:
            self._output.error(error)
        return True

    async def _ask(self, text: str) -> None:
        """One question and its answer; what goes wrong is said, and the chat goes on."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            self._output.error(ConfigError("this is not UTF-8 text", hint="set the terminal to UTF-8"))
            return
        self._written = []
        self._output.progress(WAITING, 0, 0)
        result: dict[str, Any] = {}
        failed: DaaswarmError | None = None
        with self._stoppable():
            try:
                with unwrap_groups():
                    params = {**self._params, "prompt": text, "history": self.history, "bootstrap": []}
                    if self._embedded is not None:  # those hosts run already
                        params |= {"embedded": None, "dtype": self._params["dtype"] or "f32"}
                    result = await self._call("infer", params, self._show)
            except DaaswarmError as error:
                failed = error
        self._output.end_progress()
        self._output.end_line()
        answer = result.get("text", "".join(self._written))
        if failed is not None:
            self._output.error(failed)
            if isinstance(failed, ConfigError) and self.history:
                self._say("/reset starts a new conversation, which takes less room")
            return
        if result:
            self.last = result
            self._say(f"[{result['completion_tokens']} tokens, {result['tokens_per_s']:.1f}/s; /receipt says by whom]")
        else:
            self._say("stopped")
        if answer:
            self.history = [*self.history, _turn("user", text), _turn("assistant", answer)]

    async def _show(self, event: dict[str, Any]) -> None:
        if event.get("event") == "text":
            self._written.append(event["text"])
        show(event, self._output)

    async def _hold(self, params: dict[str, Any], *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Have the node keep what answers of this model need; started when the first question may be asked."""

        async def watch(event: dict[str, Any]) -> None:
            if event.get("event") == "open":
                self._embedded = event["embedded"]
                self._holding = scope
                self._output.end_progress()
                task_status.started()
            else:
                show(event, self._output)

        self._output.progress("getting ready", 0, 0)
        with trio.CancelScope() as scope, unwrap_groups():
            await self._call("chat", params, watch)

    async def _change_model(self, name: str, nursery: trio.Nursery) -> None:
        """Go on with another model, the conversation so far included; if it can't be asked, with the one before."""
        params = {**self._params, "model": locate_model(name), "embedded": self._embedded}
        before = self._holding
        with self._stoppable() as scope, unwrap_groups():
            await nursery.start(self._hold, params)
        self._output.end_progress()
        if scope.cancelled_caught:
            self._say("stopped")
            return
        if before is not None:
            before.cancel()
        self._params = params
        self._say(f"now with {name}")

    async def _obey(self, word: str, rest: str) -> None:
        if word == "/help":
            for command, meaning in COMMANDS.items():
                self._say(f"  {command:<14} {meaning}")
            self._say("Esc-Enter or a \\ at the end starts a new line. Ctrl-C stops an answer.")
        elif word == "/model":
            others = await trio.to_thread.run_sync(complete_models, "")  # reads the disk
            self._say(f"{self._params['model']}; others here: {', '.join(others)}")
        elif word == "/system":
            self._params["system"] = rest or None
            self._say("from now on" if rest else "no system prompt from now on")
        elif word == "/receipt":
            self._show_receipt()
        elif word == "/reset":
            self.history = []
            self._say("a new conversation")
        elif word == "/save":
            self._save(rest)
        else:
            raise ConfigError(
                f"{word} is no command of the chat", hint="see /help; a question that begins with / needs a space first"
            )

    def _show_receipt(self) -> None:
        if self.last is None:
            self._say("no answer yet")
            return
        for line in format_receipt(self.last):
            self._output.result(line)

    def _save(self, name: str) -> None:
        """The conversation as JSON or, by the file's name, as text.

        Raises:
            ConfigError: no name, or the file is there already, or can't be written.
        """
        if not name:
            raise ConfigError("/save needs a file", hint="write it like /save talk.json, or talk.md")
        path = expand_user(shlex.split(name)[0] if name[0] in "'\"" else name)
        if path.suffix == ".json":
            content = json.dumps(self.history, ensure_ascii=False, indent=2) + "\n"
        else:
            content = "".join(f"**{turn['role']}**\n\n{turn['content']}\n\n" for turn in self.history)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as writing:
                writing.write(content)
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}", hint="name another file") from None
        self._say(f"{len(self.history)} turns in {path}")

    def _say(self, text: str) -> None:
        self._output.message(text)


COMMANDS = {
    "/help": "these lines",
    "/model NAME": "go on with another model",
    "/system TEXT": "the instruction before the conversation; without a text, none",
    "/receipt": "who computed the last answer",
    "/reset": "forget the conversation",
    "/save FILE": "write it to a file: JSON if the name ends in .json",
    "/quit": "leave, as Ctrl-D does",
}


def complete(before: str) -> Iterable[str]:
    """What Tab makes of a line that begins with ``/``."""
    if before.startswith("/model "):
        return [f"/model {name}" for name in complete_models(before.removeprefix("/model ").lstrip())]
    if before.startswith("/") and " " not in before:
        return [word for word in (command.partition(" ")[0] for command in COMMANDS) if word.startswith(before)]
    return []


def format_receipt(result: dict[str, Any]) -> list[str]:
    """Who computed an answer, as lines for people: no line of it is wider than it must be."""
    tokens = f"{result['prompt_tokens']} of prompt ({result['reused_tokens']} kept), {result['completion_tokens']} new"
    codec = "" if result["codec"] == "none" else f", sent in {result['codec']}"
    lines = [
        f"model    {result['model']} {result['dtype']}{codec}",
        f"root     {result['model_root']}",
        f"tokens   {tokens}",
        f"calls    {result['calls']}, {describe_retries(result['retries'])}",
    ]
    for host in result["hosts"]:
        lines.append(f"host     {host['peer_id']}" + (" (this machine)" if result["embedded"] else ""))
        moved = f"{format_bytes(host['bytes_sent'])} out, {format_bytes(host['bytes_received'])} back"
        lines.append(f"         {host['calls']} calls, {host['rows']} rows, {moved}, {host['p50_ms']:.1f} ms a call")
    return lines


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
