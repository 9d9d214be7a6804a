"""The chat: what it sends to the node, what its commands do, what Ctrl-C ends; and once for real, in a terminal."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from daaswarm.api.control import Emit
from daaswarm.cli.chat import Chat, complete
from daaswarm.cli.output import Output
from daaswarm.cli.plain_reader import PlainReader, is_plain
from daaswarm.errors import ConfigError, Interrupted, NoPeerCouldServe
from daaswarm.models.sources import find_model
from tests.e2e.processes import run_json, running
from tests.e2e.terminal import CTRL_C, CTRL_D, ENTER, ESCAPE, terminal

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}a"

HOST = {
    "peer_id": "12D3KooWx", "calls": 3, "rows": 4, "bytes_sent": 500, "bytes_received": 6000, "coded_calls": 0,
    "p50_ms": 1.5,
}  # fmt: skip
RESULT = {
    "text": "", "model": "m", "model_root": "ab" * 32, "dtype": "f32", "codec": "none",
    "prompt_tokens": 9, "reused_tokens": 5, "completion_tokens": 2, "tokens_per_s": 7.0, "calls": 3, "retries": 1,
    "hosts": [HOST], "embedded": True,
}  # fmt: skip


class Node:
    """Stands for the node: answers with the number of turns so far, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.opened: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.is_silent = False
        self.begun = trio.Event()

    async def call(self, method: str, params: dict[str, Any], emit: Emit) -> dict[str, Any]:
        if method == "chat":
            if params["model"] == "gpt-17":
                raise ConfigError("gpt-17 is not a known model", hint="see daaswarm model list")
            if params["model"] == "slow":
                self.begun.set()
                await trio.sleep_forever()
            self.opened.append(params)
            await emit({"event": "open", "model": params["model"], "model_root": "ab" * 32, "embedded": 3})
            await trio.sleep_forever()
        self.asked.append(params)
        await emit({"event": "text", "text": "half"})
        self.begun.set()
        if self.error is not None:
            raise self.error
        if self.is_silent:
            await trio.sleep_forever()
        return {**RESULT, "text": f"answer {len(params['history'])}"}


class Typist:
    """Types what it is told; an exception is a key."""

    def __init__(self, *typed: Any) -> None:
        self._typed = list(typed)

    async def read(self) -> str:
        await trio.lowlevel.checkpoint()
        typed = self._typed.pop(0) if self._typed else EOFError
        if isinstance(typed, type):
            raise typed
        return typed


PARAMS = {"model": "m", "system": None, "dtype": None, "embedded": None, "bootstrap": ["addr"]}


def make_chat(node: Node, *typed: Any) -> Chat:
    return Chat(node.call, dict(PARAMS), Output(as_json=False), Typist(*typed))


async def test_earlier_turns_go_along() -> None:
    node = Node()
    await make_chat(node, "one", "  ", "two", "/reset", "three").run()
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "answer 0"}]
    assert [(asked["prompt"], asked["history"]) for asked in node.asked] == [("one", []), ("two", said), ("three", [])]
    assert node.opened == [PARAMS]  # once for all answers, which start no hosts and meet no swarm themselves
    assert {(a["embedded"], a["dtype"], len(a["bootstrap"])) for a in node.asked} == {(None, "f32", 0)}


async def test_a_system_prompt_for_what_follows() -> None:
    node = Node()
    await make_chat(node, "/system Be brief", "one", "/system", "two").run()
    assert [asked["system"] for asked in node.asked] == ["Be brief", None]


async def test_an_error_leaves_the_chat_and_the_conversation_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node()
    node.error = NoPeerCouldServe("no live host for layer 3", hint="start one")
    chat = make_chat(node, "one", "/nonsense")
    await chat.run()
    out, err = capsys.readouterr()
    assert chat.history == [] and "half" in out
    assert "error: no live host for layer 3\nhint: start one\n" in err and "/nonsense is no command" in err


async def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(autojump_clock: object) -> None:
    node = Node()
    node.is_silent = True
    chat = make_chat(node, "one")
    assert not chat.interrupt()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chat.run)
        await node.begun.wait()
        assert chat.interrupt()
        assert not chat.interrupt()  # the second one ends the chat
    assert chat.history == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "half"}]


async def test_ctrl_c_twice_at_the_prompt_leaves() -> None:
    node = Node()
    await make_chat(node, KeyboardInterrupt, "one", KeyboardInterrupt).run()
    assert len(node.asked) == 1
    with pytest.raises(Interrupted):
        await make_chat(node, KeyboardInterrupt, KeyboardInterrupt, "two").run()
    assert len(node.asked) == 1


async def test_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node()
    await make_chat(node, "one", "/model gpt-17", "two", "/model n", "three").run()
    assert [asked["model"] for asked in node.asked] == ["m", "m", "n"]
    assert [len(asked["history"]) for asked in node.asked] == [0, 2, 4]
    assert node.opened[1]["embedded"] == 3  # as the first one was started
    assert "gpt-17 is not a known model" in capsys.readouterr().err


async def test_after_a_refused_change_there_is_nothing_to_stop() -> None:
    node = Node()
    chat = make_chat(node)
    stopped: list[bool] = []

    class Impatient(Typist):
        async def read(self) -> str:
            stopped.append(chat.interrupt())
            return await super().read()

    chat._reader = Impatient("/model gpt-17", "one", "/model n", "two")
    await chat.run()
    assert stopped == [False] * 5 and len(chat.history) == 4


async def test_a_change_of_model_can_be_stopped(autojump_clock: object, capsys: pytest.CaptureFixture[str]) -> None:
    node = Node()
    chat = make_chat(node, "/model slow", "one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chat.run)
        await node.begun.wait()
        assert chat.interrupt()
    assert [asked["model"] for asked in node.asked] == ["m"] and "stopped" in capsys.readouterr().err


async def test_a_model_that_can_not_be_asked_ends_the_chat() -> None:
    chat = Chat(Node().call, {**PARAMS, "model": "gpt-17"}, Output(as_json=False), Typist())
    with pytest.raises(ConfigError, match="gpt-17"):
        await chat.run()


async def test_a_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    await make_chat(Node(), "/receipt", "one", "/receipt").run()
    out, err = capsys.readouterr()
    assert "no answer yet" in err
    assert "9 of prompt (5 kept), 2 new" in out and "3, 1 retry" in out and "ab" * 32 in out
    assert "12D3KooWx (this machine)" in out and "3 calls, 4 rows, 500 B out, 6.0 kB back, 1.5 ms a call" in out


async def test_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my talk.json"
    chat = make_chat(Node(), "one", f"/save {path}", f"/save {path}", "/save", f"/save {tmp_path / 'talk.md'}")
    await chat.run()
    assert json.loads(path.read_text()) == chat.history and path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "talk.md").read_text() == "**user**\n\none\n\n**assistant**\n\nanswer 0\n\n"
    err = capsys.readouterr().err
    assert "File exists" in err and "/save needs a file" in err


async def test_help_and_quit(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node()
    await make_chat(node, "/help", "/quit", "one").run()
    err = capsys.readouterr().err
    assert all(command in err for command in ("/help", "/model NAME", "/save FILE", "/quit")) and node.asked == []


def test_completion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path))
    assert list(complete("/re")) == ["/receipt", "/reset"] and list(complete("what")) == []
    assert list(complete("/model smol")) == ["/model smollm2-135m-instruct"]


def test_history_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from daaswarm.cli import line_reader

    path = tmp_path / "chat-history"
    history = line_reader.History(path)
    history.store_string("a\nb")
    history.store_string("\udcff")  # not text: not kept, and no reason to end a chat
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(line_reader.History(path).load_history_strings()) == ["a\nb"]
    monkeypatch.setattr(line_reader, "HISTORY_BYTES", 4000)
    for number in range(100):
        history.store_string(f"question {number}")
    kept = list(line_reader.History(path).load_history_strings())
    assert kept[0] == "question 99" and 10 < len(kept) < 60 and path.stat().st_size <= 2000
    line_reader.History(tmp_path).store_string("a folder in its place")  # as a disk that is full


# -- in a terminal ------------------------------------------------------------------------------------------------


def make_talkative(model: Path, folder: Path) -> Path:
    """The tiny model with a chat template."""
    shutil.copytree(model, folder)
    for path in folder.glob("*manifest*"):
        path.unlink()
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def talkative(moe: Path, tmp_path: Path) -> Path:
    return make_talkative(moe, tmp_path / "talkative")


@pytest.mark.e2e
def test_a_chat_in_a_terminal(talkative: Path, cache: Path, tmp_path: Path) -> None:
    options = ["--model", str(talkative), "--embedded", "1", "--max-tokens", "3", "--data-dir", str(tmp_path / "home")]
    with terminal("infer", *options, DAASWARM_CACHE=str(cache)) as chat:
        chat.wait_for("Ctrl-D leaves")

        def say(typed: str, expected: str) -> str:
            chat.wait_for(">")
            chat.type(typed)
            return chat.wait_for(expected)

        say("first\\" + ENTER + "second" + ESCAPE + ENTER + "third" + ENTER, "/receipt says by whom]")
        say("\x1b[200~pasted\nlines\x1b[201~" + ENTER, "/receipt says by whom]")
        receipt = say("/receipt" + ENTER, "ms a call")
        assert "kept), 3 new" in receipt and "(this machine)" in receipt
        say(f"/save {tmp_path / 'talk.json'}" + ENTER, "4 turns")
        hosts = psutil.Process(chat.process.pid).children(recursive=True)
        for host in hosts:
            host.suspend()  # the answer does not come
        say("third" + ENTER, "waiting for the answer")
        chat.type(CTRL_C)
        chat.wait_for("stopped")
        for host in hosts:
            host.resume()
        say("half a line" + CTRL_C, "Ctrl-C again")
        say("fourth" + ENTER, "/receipt says by whom]")  # the node and its hosts are still there
        say(CTRL_C, "Ctrl-C again")
        say(CTRL_C, "interrupted")
        assert chat.wait() == 130 and "Traceback" not in chat.text
        assert not psutil.wait_procs(hosts, timeout=10)[1]
    turns = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["content"] for turn in turns[::2]] == ["first\nsecond\nthird", "pasted\nlines"]
    assert (tmp_path / "home" / "chat-history").stat().st_mode & 0o777 == 0o600


@pytest.mark.e2e
def test_a_chat_with_a_node_that_runs(talkative: Path, dense: Path, cache: Path, tmp_path: Path) -> None:
    other = make_talkative(dense, tmp_path / "other")
    home, environment = ["--data-dir", str(tmp_path / "home")], {"DAASWARM_CACHE": str(cache)}
    with running("join", *home, **environment) as node:
        node.wait_for("ready")
        for model in (talkative, other):
            run_json("expert", "deploy", str(model), *home, **environment)
        options = ["--model", str(talkative), "--max-tokens", "3", *home]
        with terminal("infer", *options, **environment) as chat:
            chat.wait_for("Ctrl-D leaves")

            def say(typed: str, expected: str) -> str:
                chat.wait_for(">")
                chat.type(typed + ENTER)
                return chat.wait_for(expected)

            say("first", "/receipt says by whom]")
            assert "talkative" in say("/receipt", "ms a call")
            say("/model gpt-17", "hint: ")
            say("second", "/receipt says by whom]")  # with the model from before
            say(f"/model {other}", f"now with {other}")
            say("third", "/receipt says by whom]")
            assert "other" in say("/receipt", "ms a call")
            process = psutil.Process(node.process.pid)
            process.suspend()  # the answer does not come
            say("fourth", "waiting for the answer")
            chat.type(CTRL_C)
            chat.wait_for("stopped")
            process.resume()
            say("fifth", "/receipt says by whom]")
            say(f"/save {tmp_path / 'talk.json'}", "8 turns")
            chat.wait_for(">")
            chat.type(CTRL_D)
            assert chat.wait() == 0 and "Traceback" not in chat.text
        assert node.stop(signal.SIGTERM) == 0  # it outlives the chat
    turns = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["content"] for turn in turns[::2]] == ["first", "second", "third", "fifth"]


@pytest.mark.e2e
def test_a_model_without_a_chat_template(moe: Path, cache: Path, tmp_path: Path) -> None:
    find_model(str(moe), cache)
    options = ["--model", str(moe), "--data-dir", str(tmp_path / "home")]
    with terminal("infer", *options, DAASWARM_CACHE=str(cache)) as chat:
        assert chat.wait() == 2
        assert "tiny-olmoe has no chat template" in chat.text and "hint: ask it one thing" in chat.text


async def test_a_terminal_that_can_not_move_its_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert is_plain()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\ntwo\nthree\n"))
    reader = PlainReader()
    assert [await reader.read(), await reader.read()] == ["one\ntwo", "three"]
    with pytest.raises(EOFError):
        await reader.read()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    node = Node()
    await Chat(node.call, dict(PARAMS), Output(as_json=False), PlainReader()).run()
    assert node.asked == [] and "not UTF-8" in capsys.readouterr().err
