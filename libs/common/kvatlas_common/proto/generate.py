"""Generates the gRPC stubs beside `index.proto`. With `--check`, only says whether they are up to date (exit 1)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]  # libs/common: stubs import each other by their real package names
PROTO = Path("kvatlas_common/proto/kvatlas/v1/index.proto")
STUBS = [PROTO.with_name(f"index_{kind}") for kind in ("pb2.py", "pb2.pyi", "pb2_grpc.py")]


def generate(out: Path) -> None:
    import grpc_tools

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    where = [f"-I{ROOT}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *where, str(PROTO)]) != 0:
        raise SystemExit("protoc failed: its message is above")


def _code(path: Path) -> list[str]:
    """The stub without the versions of the tool that wrote it: those may differ from machine to machine."""
    versioned = ("# Protobuf Python Version", "GRPC_GENERATED_VERSION =", "    ", "_runtime_version")
    return [line for line in path.read_text().splitlines() if line and not line.startswith(versioned)]


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        print("\n".join(f"wrote {ROOT / stub}" for stub in STUBS))
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [str(s) for s in STUBS if s.suffix == ".pyi" and _code(ROOT / s) != _code(Path(folder) / s)]
        stale += [str(s) for s in STUBS if not (ROOT / s).exists()]
    if stale:
        raise SystemExit(f"stubs are not those of {PROTO}: run `make proto` ({', '.join(stale)})")


if __name__ == "__main__":
    main()
