"""
The protocol under fire, from a seed: shipped transitions, maintenance and worker code, with a crash, a lost reply or a
sleep between any two script calls, and a ledger outside Redis that knows what must have come of it.

`python tests/simulate.py --seeds 1-20 [--loss] [--engine valkey|redis|redis62|cluster] [--replay SEED]`
"""
