#!/usr/bin/env bash
# Fails when the committed Python code of protos/ differs from what protos/ gives.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
tools/generate_protos.sh "$fresh"
if ! diff -r -x __pycache__ -x __init__.py client/aptserve/v1 "$fresh/aptserve/v1"; then
  echo 'client/aptserve/v1 is not what protos/ gives: run `make protos` and commit.' >&2
  exit 1
fi
