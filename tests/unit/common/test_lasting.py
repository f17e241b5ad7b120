"""What is built by the time a service is ready is no work for the collector any more."""

from __future__ import annotations

import gc

from kvatlas_common.lasting import YOUNG_OBJECTS, keep_what_is_built


def test_a_full_collection_passes_over_what_was_there() -> None:
    thresholds = gc.get_threshold()
    try:
        keep_what_is_built()
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 1_000
        assert gc.get_threshold()[0] == YOUNG_OBJECTS
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
