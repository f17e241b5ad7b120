#!/usr/bin/env bash
# Pins anew what the image installs: the newest versions that pyproject.toml allows. Needs `uv` (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/../.."
pin() { uv pip compile --quiet --upgrade --python-version 3.11 --python-platform linux --no-annotate --no-header "$@"; }
pin pyproject.toml --output-file deploy/docker/requirements.txt
pin --output-file deploy/docker/build-requirements.txt - <<<'hatchling>=1.25'
