#!/usr/bin/env bash
# The published CUB-200 runs: scripts/cub.sh mobilenet_v2|shufflenet_v2 /data/cub TEACHER.pth [more options]
set -euo pipefail
usage="usage: $0 mobilenet_v2|shufflenet_v2 CUB_FOLDER TEACHER.pth [options]"
student=${1:?$usage} folder=$(realpath "${2:?$usage}") teacher=$(realpath "${3:?$usage}")
cd "$(dirname "$0")/../classification"
exec python main_mgd.py "$folder" --config "recipes/cub_${student}_mgd.yaml" --teacher-resume "$teacher" "${@:4}"
