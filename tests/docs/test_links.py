"""What the documents point at is there: files, headings, make targets, examples."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def strip_code(text: str) -> str:
    """Without fenced and indented code, where brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)


def get_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", strip_code(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", strip_code(page.read_text("utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in get_anchors(target), f"{page.name} links to {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", strip_code(page.read_text("utf-8"))):
            if "://" not in link:
                waiting.append((page.parent / link).resolve())
    assert {page.relative_to(ROOT) for page in PAGES} - {page.relative_to(ROOT) for page in reached} == set()


def test_the_readme_begins_with_two_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    first = re.search(r"^## .*\n\n((?: {4}.+\n)+)", text, re.MULTILINE)
    assert first
    commands = [line.split("#")[0].split() for line in first[1].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in PAGES:
        for target in re.findall(r"^ {4}make ([a-z]+)", page.read_text("utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
    ci = ROOT / ".ci" / "run"
    assert "make test" in ci.read_text("utf-8")


def test_documents_use_commands_and_options_that_exist() -> None:
    """Every ``daaswarm ...`` line in code, word by word against the command line reference."""
    cli = (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8")
    commands = {tuple(name.split()) for name in re.findall(r"^## daaswarm (.+)$", cli, re.MULTILINE)}
    groups = {name[:1] for name in commands if len(name) > 1}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        code = re.findall(r"^ {4}(?:\w*\$ )?(daaswarm .+)$|`(daaswarm [^`]+)`", text, re.MULTILINE)
        for line in (a or b for a, b in code):
            words = line.split()[1:]
            named = [word for word in words[:2] if re.fullmatch(r"[a-z][a-z-]+", word)]
            if not named:
                continue
            known = tuple(named) in commands or tuple(named[:1]) in commands | groups
            assert known, f"{page.name}: {line}"
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", line.split(" | ")[0]):
                assert f"`{option}`" in cli or option in ("--help", "--version"), f"{page.name}: {line}"


def test_shell_examples_parse() -> None:
    for script in (ROOT / "examples").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
        assert script.stat().st_mode & 0o111, f"{script.name} is not executable"


def test_nothing_names_an_index_host_or_a_private_path() -> None:
    for path in [*PAGES, *(ROOT / "examples").iterdir()]:
        if path.is_file():
            text = path.read_text("utf-8")
            assert not re.search(r"pypi\.|files\.pythonhosted|download\.pytorch|huggingface\.co|/root/|/work/", text), (
                path
            )
