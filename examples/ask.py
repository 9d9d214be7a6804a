#!/usr/bin/env python3
"""Ask from a Python program: run ``daaswarm infer --json``, show the text as it comes, then who computed it.

    python examples/ask.py "What is the capital of France?" --max-tokens 20
    python examples/ask.py "Say hello" --bootstrap /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo...

All options are those of ``daaswarm infer``. The exit code is the program's own: 0 done, 1 failed, 2 your input,
3 no peer could serve, 130 interrupted. Needs nothing but Python and an installed daaswarm.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class AskError(Exception):
    """The command failed. ``code`` is a stable word (``no_peer``), ``text`` what had been answered before."""

    def __init__(self, code: str, message: str, hint: str, text: str, exit_code: int) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.text, self.exit_code = code, message, hint, text, exit_code


def ask(prompt: str, *options: str, on_text: Callable[[str], object] = lambda piece: None) -> dict[str, Any]:
    """The result object of ``daaswarm infer``: ``text``, ``hosts``, ``tokens_per_s`` and more (docs/reference/json.md).

    Raises:
        AskError: the command ended without an answer.
    """
    command = [sys.executable, "-m", "daaswarm", "infer", "--json", *options, "--", prompt]
    last: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            if last.get("event") == "text":
                on_text(last["text"])
    if process.returncode != 0:
        error = last.get("error", {"code": "error", "message": "ended without a word", "hint": ""})
        raise AskError(error["code"], error["message"], error["hint"], last.get("text", ""), process.returncode)
    return last


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        answer = ask(arguments[0], *arguments[1:], on_text=lambda piece: print(piece, end="", flush=True))
    except AskError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"\n\n{answer['completion_tokens']} tokens, {answer['tokens_per_s']:.1f} a second, computed by:")
    for host in answer["hosts"]:
        print(f"  {host['peer_id']}  {host['calls']} calls, {host['p50_ms']:.1f} ms each (median)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
