#!/usr/bin/env bash
# The published ImageNet run: scripts/imagenet_mobilenet_v1.sh /data/imagenet [more options]
set -euo pipefail
folder=$(realpath "${1:?usage: $0 IMAGENET_FOLDER [options]}")
cd "$(dirname "$0")/../classification"
exec python main_mgd.py "$folder" --config recipes/imagenet_mobilenet_v1_mgd.yaml "${@:2}"
