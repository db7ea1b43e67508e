#!/usr/bin/env bash
# The tests, on a fresh machine too: bash tests/run.sh [lint | --all] [pytest arguments]
# `lint` reads the code only: style, types, and the direction of imports; every other run begins with that. Without
# --all every promise is proved once; with it so is what takes long: whole benches instead of a part of each, twenty
# kills, a real chat model, the longest SLURM cases, deliberate faults.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
install_list tests/requirements.txt
workers=$(($(env -u OMP_NUM_THREADS nproc) + 2))  # it would take that variable for the number of cores
# One thread per process: tests start several at once. No test may look for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
python -m pytest -n 0 tests/test_direction.py
if [[ "${1:-}" == lint ]]; then
    exit
fi
selected=(-m "not whole")
if [[ "${1:-}" == --all ]]; then
    selected=(-m "not part")
    shift
fi
# Two workers more than cores (-n 0: none), since some tests mostly wait, for SLURM above all. Each goes through the
# files in order, so that what a file prepares is mostly prepared once, and takes from another's end when it has nothing
# left.
if (($# == 0)); then
    set -- --ignore tests/test_direction.py
fi
python -m pytest -n "$workers" --dist worksteal "${selected[@]}" "$@"
