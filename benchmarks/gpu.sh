#!/usr/bin/env bash
# Run all GPU tests and benchmarks of a new machine in one command, meant to take under six minutes.
#
#   benchmarks/gpu.sh --data FOLDER [-o OUT] [--device cuda|cpu] [--small] [--only SECTION ...]
#
# FOLDER holds cifar-10-batches-py. Requires a Python with PyTorch and numpy; uses pytest and
# pyautoattack if they are installed, and names what was left out. Installs and downloads nothing.
# Writes OUT/gpu.json and OUT/gpu.md, the table for docs/benchmarks.md.
# To try the whole script without a GPU: benchmarks/gpu.sh --device cpu --small
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
"$python" - <<'CHECK'
import sys

missing = []
for package in ("torch", "numpy"):
    try:
        __import__(package)
    except ImportError:
        missing.append(package)
sys.exit(f"gpu.sh: {sys.executable} lacks {', '.join(missing)}" if missing else 0)
CHECK
PYTHONPATH="$here/src:$here/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 \
    exec "$python" "$here/benchmarks/gpu.py" "$@"
