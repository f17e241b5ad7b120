"""Measurements against the budgets, each beside a peer where there is one."""
