"""Side-by-side measurements: Relay and a peer in one run on one machine, as real processes.

    python -m tests.bench.gpt_training   the GPT against the usual notebook's loop, and against the processor's peak
    python -m tests.bench.scaling        two ranks of one thread against one process of two
    python -m tests.bench.decoding       decoding with a cache, in batches, against the usual loop

Each takes --quick (under a minute on two idle cores, same figures, noisier) and --data PATH, prints a table for people
and, as its last line, one JSON object. What is compared takes turns, A B A B, and medians are given, since a machine's
speed drifts; even so, figures from a busy machine say little.
"""
