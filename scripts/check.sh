#!/usr/bin/env bash
# Every check, the same here and in CI: style, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy --strict .
# One worker per core, each on one thread: the networks are so small that threads mostly wait for each other.
OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal "$@"
