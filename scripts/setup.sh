#!/bin/sh
# Everything `make demo` and `make test` need, in .venv; the second time it only compares a checksum.
#
#   PYTHON=python3.12     which interpreter makes the .venv (3.10 or newer)
#   TORCH_INDEX=URL       package index to take torch from: a CPU or CUDA wheel index of PyTorch
#   SYSTEM_SITE=1         keep the torch that is already installed for that interpreter
#   PORT=7860             refuse to start when this port is taken (the demo's pages)
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1"; shift; for line in "$@"; do say "  -> $line"; done; exit 2; }

# 1. An interpreter, and one that can make environments.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$PYTHON"; then break; fi
    done
fi
command -v "$PYTHON" >/dev/null || die "no interpreter '$PYTHON'" \
    "apt-get install python3 python3-venv" "or name one: make ${1:-demo} PYTHON=/path/to/python3.12"
new_enough "$PYTHON" || die "$("$PYTHON" --version 2>&1) is too old; Python 3.10 or newer is needed" \
    "make ${1:-demo} PYTHON=/path/to/python3.12"

# 2. The port of the pages, before anything is downloaded.
if [ -n "${PORT:-}" ]; then
    "$PYTHON" -c '
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try: probe.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError: sys.exit(1)' "$PORT" || die "port $PORT is in use" \
        "make demo ARGS='--port $((PORT + 10))'" "or do without pages: make demo ARGS=--no-serve"
fi

# 3. Done before?
stamp="$(cksum < pyproject.toml)"
if [ -x .venv/bin/reelhf ] && [ "$(cat .venv/.reelhf 2>/dev/null)" = "$stamp" ]; then exit 0; fi

# 4. Room: a CUDA build of torch brings its libraries along, a CPU build does not.
if [ -n "${TORCH_INDEX:-}${SYSTEM_SITE:-}" ] || [ -d .venv ]; then need=5; else need=10; fi
free=$("$PYTHON" -c 'import shutil; print(shutil.disk_usage(".").free // 2**30)')
[ "$free" -ge "$need" ] || die "$free GB free in $(pwd); the environment needs $need GB" \
    "free some disk" "or take a CPU build of torch, half the size: make ${1:-demo} TORCH_INDEX=<CPU wheel index of PyTorch>"

# 5. The environment. A half-made one, from an interrupted start, is made anew.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || die "$PYTHON cannot make environments (venv, ensurepip)" \
        "apt-get install $("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    say "creating .venv with $("$PYTHON" --version 2>&1)"
    rm -rf .venv
    "$PYTHON" -m venv ${SYSTEM_SITE:+--system-site-packages} .venv
fi
torch="$(sed -n 's/^ *"\(torch>[^"]*\)".*/\1/p' pyproject.toml)"
quiet=-q; if [ -t 1 ]; then quiet=; fi
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1  # DeepSpeed without compiled kernels
install() { .venv/bin/python -m pip install $quiet "$@" || die "pip could not install $*" \
    "check the network, then run the same command again: what is there is kept"; }

if [ -n "${SYSTEM_SITE:-}" ]; then
    .venv/bin/python - "$torch" <<'PY' || { rm -rf .venv; die "SYSTEM_SITE=1, but $PYTHON has no torch in the range $torch" "leave SYSTEM_SITE out"; }
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(not Requirement(sys.argv[1]).specifier.contains(version))
PY
else
    say "installing $torch${TORCH_INDEX:+ from $TORCH_INDEX}"
    # its dependencies come with the project, from the usual index
    if [ -n "${TORCH_INDEX:-}" ]; then install --no-deps --index-url "$TORCH_INDEX" "$torch"; else install "$torch"; fi
fi
say "installing reelhf and its dependencies"
install -e '.[dev]'
printf '%s\n' "$stamp" > .venv/.reelhf
say "ready: .venv/bin/reelhf"
