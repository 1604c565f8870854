#!/usr/bin/env bash
# Everything that wants a GPU, in one command: builds, tests, sanitizers, timings, memory, peers.
#
#     dev/bench/gpu.sh [check|bench|peers|all] [--out DIR] [--minutes N] [--dry-run]
#
#     check    builds every variant; test_gpt2, the kernels of dev/cuda, and all of them under compute-sanitizer
#     bench    GPT-2 124M and 1558M in every mode: tokens/s, the driver's peak; each kernel of dev/cuda; a profile
#     peers    PyTorch, eager and compiled, and llm.c (--llmc DIR), the same shapes and the same measure
#     all      one after the other
#
# A stage takes less than 9 minutes and leaves JSON in dev/bench/results/GPU; called again it goes on with what is missing.
# Needs the CUDA Toolkit and Python 3.9; peers needs PyTorch. PYTHON=path says which Python. dev/bench/README.md has more.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "gpu.sh: $python is not there; expected Python 3.9 or later (PYTHON=path)" >&2
    exit 1
fi
exec "$python" -B "$here/gpu.py" "$@"
