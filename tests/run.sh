#!/usr/bin/env bash
# The whole test suite, on a fresh machine too: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
# One thread per process: tests start several at once. No test may look for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
python -m pytest "$@"
