"""All tests, in two processes at once: those that start whole swarms mostly wait for them, the others compute.

python -m tests [pytest's options]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SWARMS = ("e2e",)  # folders of the first kind; both take about as long
NO_TESTS = 5  # pytest's exit code where an option leaves none


def main() -> int:
    options = sys.argv[1:]
    others = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("test_*.py")))
    groups = [[name for name in others if name not in SWARMS], [name for name in SWARMS if name in others]]
    files = [str(path) for path in sorted(ROOT.glob("test_*.py"))]
    codes: list[int] = []
    with tempfile.TemporaryFile() as kept:
        command = [sys.executable, "-m", "pytest", *options]
        second = subprocess.Popen(
            [*command, *(str(ROOT / name) for name in groups[1])],
            stdout=kept,
            stderr=subprocess.STDOUT,
            cwd=ROOT.parent,
        )
        try:
            codes.append(
                subprocess.run(
                    [*command, *(str(ROOT / name) for name in groups[0]), *files], cwd=ROOT.parent
                ).returncode
            )
            codes.append(second.wait())
        finally:
            if second.poll() is None:
                second.terminate()
                second.wait()
            kept.seek(0)
            sys.stdout.buffer.write(kept.read())
            sys.stdout.flush()
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    return max(failed, default=0 if 0 in codes else NO_TESTS)


if __name__ == "__main__":
    sys.exit(main())
