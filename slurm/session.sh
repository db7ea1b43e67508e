# shellcheck shell=bash
# One session of a run inside a batch job. The batch script sources this and calls `session`.
#
# SLURM's signal some minutes before the end of the job comes to the batch shell alone. The shell passes it on to srun,
# srun to launch.run on each node, and that to its ranks; these save and leave; and the shell, still alive, looks at what
# they left and says what comes next: the job is done, goes back into the queue, or has failed.
set -euo pipefail

step=         # srun's process, while it runs
asked=false   # SLURM's signal before the end; also `scancel --signal=USR1 --batch`
taken=false   # SIGTERM: SLURM ends the job (scancel, preemption, a node, the time limit) and tells the tasks itself

# Set before anything is started: without these traps the first signal would end this shell, and the job with it.
trap 'asked=true; pass_on' USR1
trap 'taken=true; end_in_time' TERM

pass_on() {
    if [ -n "$step" ]; then kill -s USR1 "$step" 2> /dev/null || true; fi
}

# KillWait lies between SIGTERM and SIGKILL. Ranks that hang must not use all of it: the verdict is still to be written.
end_in_time() {
    if [ -n "$step" ]; then (sleep "$save_wait" && kill -s KILL "$step") > /dev/null 2>&1 & fi
}
kill_wait=$(scontrol show config 2> /dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p' || true)
kill_wait=${kill_wait:-30}
save_wait=$(( kill_wait > 20 ? kill_wait - 10 : kill_wait / 2 ))

# Runs a command to its end, whatever signals come, and sets `status`. In the background, since a trap has to wait for
# what runs in the foreground.
run() {
    "$@" &
    step=$!
    if $asked; then pass_on; fi  # it came when there was nobody to pass it on to
    # A trapped signal ends `wait`, while the command goes on.
    while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done
    status=0
    wait "$step" || status=$?
    step=
}

# Copies data and environment to a disk of each node, and has them used instead.
stage() {
    staged=$STAGE_TO/relay-$SLURM_JOB_ID-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    if [ -d .venv ] && [ -z "${container[*]}" ]; then
        # One file to read for every node, instead of tens of thousands.
        if ! tar -df .venv.tar -C .venv ./pyvenv.cfg ./installed-requirements.txt > /dev/null 2>&1; then
            echo "packing .venv into .venv.tar, once"
            tar -cf ".venv.tar.$SLURM_JOB_ID" -C .venv . && mv ".venv.tar.$SLURM_JOB_ID" .venv.tar
        fi
        PATH=$staged/venv/bin:$PATH
    fi
    run srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash slurm/stage.sh "$staged" "$data"
    export STAGED_FROM=$data STAGED_DATA=$staged/data
}

unstage() {
    # Where SLURM has ended the job it starts nothing more: then only this node is tidied.
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 rm -rf "$staged" 2> /dev/null || rm -rf "$staged"
}

# Asks what comes next, and sets `verdict`.
judge() {
    local more=()
    if $taken; then more=(--taken); fi
    verdict=0
    "${container[@]}" python -m launch.slurm.job end "$run_dir" --status "$status" \
        --failure-limit "${FAILURE_LIMIT:-3}" "${more[@]}" || verdict=$?
}

requeue() {
    # One task of an array has the array's own number, by which all of its tasks would be queued again.
    local said job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    for _ in {1..30}; do
        if said=$(scontrol requeue "$job" 2>&1); then return; fi
        if [[ $said == *disabled* ]]; then break; fi
        sleep 10  # the controller may be restarting
    done
    echo "job $job is not queued again: $said"
    echo "The next job of its chain goes on, if there is one; else the same submission continues the run."
}

# The processes of a module on all nodes: on each of them launch.run starts its ranks, one per GPU, or as many as were
# asked for on a CPU. A node whose ranks fail must not leave the others waiting.
ranks() {
    run srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
        "${container[@]}" python -m launch.run --processes "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" -m "$@"
}

# session CONFIG [--key value ...]
session() {
    local about nothing_to_do=0
    about=$("${container[@]}" python -m launch.slurm.job run "$@")
    { read -r script; read -r run_dir; read -r data; } <<< "$about"
    script=${SCRIPT:-$script}

    "${container[@]}" python -m launch.slurm.job begin "$run_dir" || nothing_to_do=$?
    if [ $nothing_to_do = 3 ]; then exit 0; elif [ $nothing_to_do != 0 ]; then exit 1; fi

    # A process that finds an error for the user to mend writes it here.
    export RELAY_ERROR_FILE=$run_dir/error-$SLURM_JOB_ID.txt
    rm -rf "$RELAY_ERROR_FILE"

    status=0
    if [ -n "${STAGE_TO:-}" ]; then stage; fi
    if [ $status = 0 ] && [ "${PREFLIGHT:-1}" = 1 ] && [ ! -e "$run_dir/sessions.json" ]; then
        ranks launch.doctor "$@" --script "$script"
    fi
    if [ $status = 0 ] && ! $asked && ! $taken; then ranks "$script" "$@"; fi
    if [ -n "${STAGE_TO:-}" ]; then unstage; fi

    local ended_by_slurm=$taken
    judge
    # Cancelled in the meantime: a job that is requeued now would come back to life.
    if [ $verdict = 75 ] && [ $ended_by_slurm != $taken ]; then judge; fi
    case $verdict in
        75) requeue ;;
        76) verdict=75 ;;  # resumable, but not by itself
    esac
    exit $verdict
}

# The user's own lines need not be as strict as these.
set +eu
source slurm/environment.sh
set -eu
export SLURM_EXPORT_ENV=ALL PYTHONUNBUFFERED=1

# Where the ranks of several nodes meet: on the first, which is this one, at a port that no other job there uses.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]}
MASTER_PORT=$(( 12000 + 101 * SLURM_JOB_ID % 20000 ))
while (: < "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$(( MASTER_PORT + 1 )); done
export MASTER_ADDR MASTER_PORT
