"""The image's HEALTHCHECK: healthy when whichever service this container runs answers `GET /healthz`.

The router and the indexer listen at different ports, and one image runs either or both: healthy is that one answers.
Other addresses than the defaults are given as arguments, `<host:port>`. Standard library only; Kubernetes does not use
this, it has probes of its own.
"""

import sys
from http.client import HTTPConnection, HTTPException

ROUTER, INDEXER = "127.0.0.1:8080", "127.0.0.1:8081"
TIMEOUT_S = 1.0


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    connection = HTTPConnection(host.strip("[]"), int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if any(map(answers, sys.argv[1:] or (ROUTER, INDEXER))) else 1)
