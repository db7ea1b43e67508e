#!/usr/bin/env bash
# The whole test suite, on a fresh machine too: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
# One thread per process: tests start several at once. No test may look for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
# Three workers (-n 0: none), since some tests mostly wait, for SLURM above all. Each goes through the files in order, so
# that what a file prepares is mostly prepared once, and takes from another's end when it has nothing left.
python -m pytest -n 3 --dist worksteal "$@"
