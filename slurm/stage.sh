# shellcheck shell=bash
# Run once on every node: bash slurm/stage.sh FOLDER DATA copies the data set and the environment to a disk of the node.
set -euo pipefail
mkdir -p "$1"
# Nodes may turn out to share this disk: then the first one copies, and the others wait for it.
exec 9> "$1/lock"
flock 9
if [ ! -e "$1/complete" ]; then
    rm -rf "$1/data" "$1/venv"  # of a copy that was interrupted
    cp -r "$2" "$1/data"
    if [ -f .venv.tar ]; then mkdir -p "$1/venv" && tar -xf .venv.tar -C "$1/venv"; fi
    touch "$1/complete"
fi
