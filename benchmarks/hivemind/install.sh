#!/usr/bin/env bash
# An environment of its own for hivemind, the peer that `make bench-dht` measures beside. Linux, Python 3.11.
# hivemind 1.1.12 brings its libp2p daemon in the wheel. With numpy 2.4 its 8-bit codecs fail, so numpy stays below.
set -euo pipefail
venv="${1:?usage: install.sh VENV}"
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "hivemind==1.1.12" "numpy<2.4" "setuptools<85" "pydantic<3" psutil
