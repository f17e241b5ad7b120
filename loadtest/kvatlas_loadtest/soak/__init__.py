"""Steady load on real processes for minutes: memory stays flat, and no socket, thread or task is left behind.

python -m kvatlas_loadtest.soak --minutes 10
"""
