"""A server that cannot have its address says which, why, and what to change; the services print it and exit."""

from __future__ import annotations

import errno
import os


class AddressUnavailable(OSError):
    """An address to listen on cannot be had. `str()` is a sentence for the operator."""

    def __init__(self, what: str, address: str, why: str, cure: str) -> None:
        super().__init__(f"cannot listen for {what} on {address}: {why}. {cure}")
        self.address = address


def unavailable(what: str, address: str, error_number: int, flag: str) -> AddressUnavailable:
    """The error of a bind (its errno) as the sentence above. `flag`: the command-line flag that sets this address."""
    match error_number:
        case errno.EADDRINUSE:
            why = "the address is already in use"
            cure = f"Stop the process that listens there (`ss -ltnp` shows it), or choose another with {flag}."
        case errno.EACCES:
            why, cure = "no permission", f"Choose a port above 1023 with {flag}."
        case errno.EADDRNOTAVAIL | errno.ENODEV:
            why, cure = "this machine has no such address", f"Give {flag} one that it has, or the one for all of them."
        case _:
            why, cure = os.strerror(error_number), f"Check {flag}."
    return AddressUnavailable(what, address, why, cure)
