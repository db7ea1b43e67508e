"""Side-by-side measurements: Relay and a peer in one run on one machine, as real processes.

    python -m tests.bench.gpt_training      the GPT against the usual notebook's loop, and the processor's peak
    python -m tests.bench.seq2seq_training  the seq2seq against the usual tutorial's loop
    python -m tests.bench.decoding          decoding in batches against one sentence at a time, both models
    python -m tests.bench.scaling           two ranks of one thread against one process of two
    python -m tests.bench.save_stall        saving in the background against waiting for the disk
    python -m tests.bench.resume_time       start to first step: resumed against new
    python -m tests.bench.verify_speed      verifying a checkpoint against reading and hashing
    python -m tests.bench.wandb_gone        a wandb server that goes away against no wandb
    python -m tests.bench.soak              kills at random moments, counting what is lost

Each takes --quick (about a minute on two idle cores, same figures, noisier) and --data PATH, prints a table for people
and, as its last line, one JSON object. What is compared takes turns, A B A B, and medians are given, since a machine's
speed drifts; even so, figures from a busy machine say little. --smoke takes seconds and shows that a bench runs: two
steps of everything, in the bench's own process where that is possible, so that its speeds mean nothing.
"""

import training  # noqa: F401  before torch, since it says how OpenMP's threads wait, to what is forked from here, too
