#!/usr/bin/env bash
# Everything that wants a GPU: builds, tests, sanitizers, speed, memory, peers. gpu.py has the commands, README.md explains.
#
#     dev/bench/gpu.sh [check|bench|peers|all] [--out DIR] [--minutes N] [--dry-run]
#
# A stage takes less than 9 minutes; called again, it goes on with what is missing.
# Needs the CUDA Toolkit and Python 3.9; peers needs PyTorch. PYTHON=path says which Python.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "gpu.sh: $python is not there; expected Python 3.9 or later (PYTHON=path)" >&2
    exit 1
fi
exec "$python" -B "$here/gpu.py" "$@"
