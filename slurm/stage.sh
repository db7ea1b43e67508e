# shellcheck shell=bash
# Run once on every node: bash slurm/stage.sh FOLDER DATA copies the data set and the environment to a disk of the node.
# What lies in FOLDER is run. So it is made here and for this user alone, under a name that nobody can know before.
set -euo pipefail
umask 077
# Of an earlier session of this job, which was killed.
for left in "${1%-*}"-*; do
    if [ "$left" != "$1" ] && [ -d "$left" ] && [ ! -L "$left" ] && [ -O "$left" ]; then rm -rf "$left"; fi
done
# Nodes may turn out to share this disk: then the first one makes the folder and copies, and the others wait for it.
if ! mkdir "$1" 2> /dev/null && { [ -L "$1" ] || [ ! -d "$1" ] || [ ! -O "$1" ]; }; then
    echo "error: cannot make $1 on $(hostname): name a folder that is there on every node, and yours to write to" >&2
    exit 1
fi
exec 9> "$1/lock"
flock 9
if [ ! -e "$1/complete" ]; then
    rm -rf "$1/data" "$1/venv"  # of a copy that was interrupted
    cp -rH "$2" "$1/data"
    if [ -f .venv.tar ]; then mkdir "$1/venv" && tar -xf .venv.tar -C "$1/venv"; fi
    touch "$1/complete"
fi
