#!/bin/sh
# Writes the stubs and the reference into the folder given (default: protos/gen). PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")"
out=${1:-gen}
python=${PYTHON:-python3}
PATH="$(dirname "$(command -v "$python")"):$PATH"
includes=$("$python" -c 'import google.rpc.status_pb2 as s, pathlib; print(pathlib.Path(s.__file__).parents[2])')
mkdir -p "$out"
# shellcheck disable=SC2046
"$python" -m grpc_tools.protoc -I . -I "$includes" \
  --python_out="$out" --mypy_out="quiet:$out" \
  --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" \
  --include_imports --include_source_info --descriptor_set_out="$out/vitrine.binpb" \
  $(find vitrine -name '*.proto' | sort)
touch "$out/vitrine/py.typed" # type checkers of callers read the stubs
"$python" document.py "$out/vitrine.binpb" "$out/api.md"
