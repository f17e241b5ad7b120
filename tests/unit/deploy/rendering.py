"""What kustomize makes of `deploy/k8s`, kept in `tests/data/k8s/rendered` so that tests need no kustomize.

`python -m tests.unit.deploy.rendering` makes it anew. kustomize is a Go program that no Python package ships; where
neither it nor kubectl is installed, a digest of the sources tells that the kept ones are of this state.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
K8S = ROOT / "deploy" / "k8s"
DATA = ROOT / "tests" / "data" / "k8s"
RENDERED = DATA / "rendered"
DIGEST = RENDERED / "SOURCES.sha256"
OLDEST_KUSTOMIZE = 5
SOURCES: dict[str, Path] = {
    "base": K8S / "base",
    "ha": K8S / "overlays" / "ha",
    "ha-external": K8S / "overlays" / "ha-external",
    "vllm-connect": K8S / "vllm" / "connect",
    "vllm-replay": K8S / "vllm" / "replay",
    "vllm-dial": K8S / "vllm" / "dial",
    "ha-metrics": DATA / "composed" / "ha-metrics",
    "replay": DATA / "composed" / "replay",
    "ha-dial": DATA / "composed" / "ha-dial",
}
INDEX = tuple(name for name in SOURCES if not name.startswith("vllm"))
ENGINES = tuple(name for name in SOURCES if name.startswith("vllm"))


def kustomize() -> tuple[str, ...] | None:
    """The command that builds a folder, or None where there is none, or one too old to know components."""
    for version, build in (
        (("kustomize", "version"), ("kustomize", "build")),
        (("kubectl", "version", "--client"), ("kubectl", "kustomize")),
    ):
        if shutil.which(version[0]):
            said = subprocess.run(version, capture_output=True, text=True, check=False, timeout=30).stdout
            found = re.search(r"(?:Kustomize Version: |^\{?)v(\d+)\.", said, re.MULTILINE)
            if found and int(found[1]) >= OLDEST_KUSTOMIZE:
                return build
    return None


def build(command: tuple[str, ...], folder: Path) -> str:
    return subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True, timeout=60).stdout


def sources_digest() -> str:
    """Of every file that a build may read: names and contents."""
    digest = hashlib.sha256()
    for folder in (K8S, DATA / "composed"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    command = kustomize()
    if command is None:
        raise SystemExit(f"neither kustomize nor a kubectl with kustomize {OLDEST_KUSTOMIZE} or later is installed")
    RENDERED.mkdir(exist_ok=True)
    for name, folder in SOURCES.items():
        (RENDERED / f"{name}.yaml").write_text(build(command, folder), "utf-8")
    DIGEST.write_text(sources_digest() + "\n", "utf-8")


if __name__ == "__main__":
    main()
