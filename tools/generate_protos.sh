#!/usr/bin/env bash
# Writes the Python code of protos/ into client/, or into the folder given.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-client}
python -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  protos/aptserve/v1/*.proto
