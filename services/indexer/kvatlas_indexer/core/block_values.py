"""Block values of the shared store to masks of their holders.

A value is the records of `projection.RECORD`, 5 bytes a holder. Most blocks have few holders, and neighbours in a
prompt the same ones: those cost a comparison. A prompt that hundreds of engines hold, each to a depth of its own, is
hundreds of values of a kilobyte: those are taken apart all at once, as a matrix of values by slots whose packed rows
are the masks. Values seen before are remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvatlas_indexer.core.projection import RECORD

VALUES_REMEMBERED_MAX = 4096
WIDE_BYTES = 128 * RECORD.size
"""From so many bytes of unseen values on, the matrix costs less than going through them record by record."""
MATRIX_MAX = 1 << 22
"""Cells of the matrix, a byte each; more values are done in several."""

_LOW_BITS = 0xFFFF
_RECORDS = np.dtype([("number", ">u4"), ("copies", "u1")])


class BlockMasks:
    """Bit i of a mask is that of the slot `numbers[i]`; any other number stands for nobody."""

    def __init__(self, numbers: Iterable[int]) -> None:
        of = {number: index for index, number in enumerate(numbers)}
        self._bits = {number: 1 << index for number, index in of.items()}
        self._numbers = np.array(sorted(of), dtype=np.uint32)
        self._columns = np.array([of[number] for number in sorted(of)], dtype=np.intp)
        self._guess = np.zeros(_LOW_BITS + 1, dtype=np.intp)  # by the low bits of a number: where it may be
        self._guess[self._numbers & _LOW_BITS] = np.arange(len(self._numbers))
        self._remembered: dict[bytes, int] = {}

    def masks(self, values: Sequence[bytes | None]) -> list[int]:
        """One per value; 0 for a block nobody holds."""
        known = self._remembered
        self._read([value for value in _changes(values) if value not in known])
        masks: list[int] = []
        last: bytes | None = None
        mask = 0
        for value in values:
            if value != last:
                last, mask = value, known[value] if value else 0
            masks.append(mask)
        if len(known) > VALUES_REMEMBERED_MAX:
            self._remembered = {}
        return masks

    def _read(self, values: list[bytes]) -> None:
        if sum(map(len, values)) >= WIDE_BYTES and len(self._numbers):
            rows = max(1, MATRIX_MAX // len(self._numbers))
            for start in range(0, len(values), rows):
                some = values[start : start + rows]
                self._remembered.update(zip(some, self._all_at_once(some), strict=True))
        else:
            self._remembered.update((value, self._one(value)) for value in values)

    def _one(self, value: bytes) -> int:
        mask, bits = 0, self._bits
        for number, _ in RECORD.iter_unpack(value[: _whole(value)]):
            mask |= bits.get(number, 0)
        return mask

    def _all_at_once(self, values: Sequence[bytes]) -> list[int]:
        numbers = np.frombuffer(b"".join([value[: _whole(value)] for value in values]), dtype=_RECORDS)["number"]
        counts = np.fromiter(map(len, values), dtype=np.intp, count=len(values)) // RECORD.size
        rows = np.repeat(np.arange(len(values)), counts)
        held: NDArray[np.uint32] = numbers.astype(np.uint32)
        at = self._places(held)
        live = self._numbers[at] == held
        matrix = np.zeros((len(values), len(self._numbers)), dtype=np.uint8)
        matrix[rows[live], self._columns[at[live]]] = 1
        packed = np.packbits(matrix, axis=1, bitorder="little")
        width, data = packed.shape[1], packed.tobytes()
        return [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]

    def _places(self, held: NDArray[np.uint32]) -> NDArray[np.intp]:
        """Where numbers are among ours; anywhere for those that are not."""
        at: NDArray[np.intp] = self._guess[held & _LOW_BITS]
        (others,) = np.nonzero(self._numbers[at] != held)
        at[others] = np.searchsorted(self._numbers, held[others]).clip(max=len(self._numbers) - 1)
        return at


def _changes(values: Iterable[bytes | None]) -> Iterable[bytes]:
    """The values that differ from the one before them."""
    last: bytes | None = None
    for value in values:
        if value != last:
            last = value
            if value:
                yield value


def _whole(value: bytes) -> int:
    """A value that is cut off holds what it holds up to there."""
    return len(value) // RECORD.size * RECORD.size
