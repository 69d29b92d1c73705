#!/usr/bin/env bash
# Every check, the same here and in CI: style, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy --strict mgd
python -m pytest "$@"
