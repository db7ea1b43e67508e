"""A run that lives at an address: machines come and go, and each goes on from what the last one had sent there.

Imported only where `run_at` names one. `store` has the files at an address, whatever serves it; `claim` the right to
publish there, which one machine has at a time; `home` what a run does with both. docs/addresses.md is for users.

    URL/claim/0000000042.json                      the newest link of the claim's chain: its holder, what is published
    URL/7/step-0000000250-0123456789abcdef/...     a checkpoint that the seventh claim sent, with its manifest
    URL/7/metrics.jsonl  status.json  report.html  the run's record, as it was with that claim's newest checkpoint
"""
