"""What grows with what: `python -m kvatlas_loadtest.bench.curves`."""
