"""What is built by the time a service is ready is no work for the collector any more."""

from __future__ import annotations

import gc

from kvatlas_common.lasting import keep_what_is_built


def test_a_full_collection_passes_over_what_was_there() -> None:
    try:
        keep_what_is_built()
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 1_000
    finally:
        gc.unfreeze()
