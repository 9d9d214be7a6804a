"""The pictures of the terminal: shown in the README, of this program, and of nobody's machine."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = sorted((ROOT / "docs" / "images").glob("*.svg"))


def test_demo_infer_status_and_an_error_are_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert {path.stem for path in IMAGES} >= {"demo", "infer", "status", "error"}
    for path in IMAGES:
        assert f"](docs/images/{path.name})" in readme


@pytest.mark.parametrize("path", IMAGES, ids=[path.name for path in IMAGES])
def test_a_picture_shows_nobodys_machine(path: Path) -> None:
    texts = [element.text or "" for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    shown = "\n".join(texts)
    assert texts[0].startswith("$ daaswarm") and "Traceback" not in shown
    paths = set(re.findall(r"(?<![\w…])/[a-z][^\s]*", shown))
    assert all(name.startswith(("/home/you/", "/ip4/127.0.0.1/", "/receipt", "/help")) for name in paths), paths


def test_a_screen_becomes_a_picture() -> None:
    pyte = pytest.importorskip("pyte")
    spec = importlib.util.spec_from_file_location("record", ROOT / "docs" / "record.py")
    assert spec is not None and spec.loader is not None
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    screen = pyte.Screen(20, 5)
    pyte.ByteStream(screen).feed(b"plain \x1b[1;31merror:\x1b[0m <&>\r\n\x1b[38;5;208mx\x1b[0m")
    texts = list(ElementTree.fromstring(record.make_svg(screen)).iter("{http://www.w3.org/2000/svg}text"))
    assert [text.text for text in texts] == ["plain", "error:", "<&>", "x"]
    assert texts[1].get("fill") == record.COLORS["red"] and texts[1].get("font-weight") == "bold"
    assert texts[3].get("fill") == "#ff8700" and texts[3].get("y") != texts[0].get("y")
