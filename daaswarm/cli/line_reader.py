"""Reads what a person types into a chat: lines with history, several of them where wanted. Needs prompt_toolkit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import trio
from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.shortcuts import CompleteStyle

HISTORY_BYTES = 1 << 20  # thousands of questions; past it the older half goes

# How a line is completed: from the text before the cursor to whole texts that it may become.
Complete = Callable[[str], Iterable[str]]


class LineReader:
    """One person at one terminal.

    Args:
        history_path: earlier questions; made mode 0600. A disk that can't be written costs the history, not the chat.
        complete: what Tab offers.
    """

    def __init__(self, history_path: Path, complete: Complete) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=History(history_path),
            multiline=True,  # so that pasted text stays whole; Enter accepts all the same
            key_bindings=make_key_bindings(),
            completer=_Completer(complete),
            complete_while_typing=False,
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            prompt_continuation="  ",
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
        )

    async def read(self) -> str:
        """What was typed, when Enter ends it. Cancelling gives the terminal back as it was.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C; what was typed so far is dropped.
        """

        async def leave_when_cancelled() -> None:
            nonlocal is_leaving
            try:
                await trio.sleep_forever()
            finally:
                is_leaving = True
                app = self._session.app
                if not is_done and app.loop is not None:
                    # Either the prompt hears of it, or it has ended by itself, and its loop with it.
                    with contextlib.suppress(RuntimeError):
                        app.loop.call_soon_threadsafe(leave)

        def leave() -> None:
            if is_leaving and self._session.app.is_running:
                self._session.app.exit(exception=EOFError)

        def prompt() -> str | type[BaseException]:
            # Out of a thread as a value: a KeyboardInterrupt that is raised there would be taken for the process's.
            try:
                return self._session.prompt("> ", handle_sigint=False, pre_run=leave)
            except (EOFError, KeyboardInterrupt) as error:
                return type(error)

        is_done = is_leaving = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave_when_cancelled)
            typed = await trio.to_thread.run_sync(prompt)
            is_done = True
            nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint()
        if not isinstance(typed, str):
            raise typed
        return typed


def make_key_bindings() -> KeyBindings:
    """Enter sends, unless a backslash is at the end; Esc-Enter (Alt-Enter) starts a new line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer: Buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class History(FileHistory):
    """Questions in a file that is its owner's alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.fspath(path))
        self._path = path
        with contextlib.suppress(OSError):
            trim(path)

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        if any("\ud800" <= c <= "\udfff" for c in string):  # no text in the terminal's encoding
            return
        with contextlib.suppress(OSError):
            os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600))
            super().store_string(string)


def trim(path: Path) -> None:
    """Keep the newer half of a history that has become too long, from the start of an entry on.

    Raises:
        OSError: it can't be read or written.
    """
    if not path.exists() or path.stat().st_size <= HISTORY_BYTES:
        return
    content = path.read_bytes()[-HISTORY_BYTES // 2 :]
    start = content.find(b"\n# ")  # the line before an entry says when
    shorter = path.with_name(f"{path.name}.new")
    file = os.open(shorter, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(file, "wb") as writing:
        writing.write(content[start:] if start >= 0 else b"")
    shorter.replace(path)


class _Completer(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        for whole in self._complete(before):
            yield Completion(whole, start_position=-len(before))
