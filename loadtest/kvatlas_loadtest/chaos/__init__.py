"""Faults on a whole deployment of real processes, and whether the index is right again afterwards.

    python -m kvatlas_loadtest.chaos --seed 1

Every scenario is the same play: steady load, a fault, its end, recovery. Only the engines' own block tables decide what
is true (`truth.py`); they are held against what every shard answers. `plan.py` says what is done to whom, from a seed;
`deployment.py` runs the processes and `faults.py` breaks them; `bars.py` says what must hold.
"""
