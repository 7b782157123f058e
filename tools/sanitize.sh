#!/bin/sh
# Build the engine with AddressSanitizer and UBSan in a virtual environment of its own and run the tests that reach it,
# or the fuzzer with the given arguments.
#     sh tools/sanitize.sh [PYTHON]
#     sh tools/sanitize.sh PYTHON programs --minutes 60
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
[ $# -eq 0 ] || shift
venv=.venv-sanitize
[ -x $venv/bin/python ] || "$python" -m venv $venv
$venv/bin/pip install --quiet --upgrade pip
$venv/bin/pip install --quiet -C cmake.define.NMCOMPILE_SANITIZE=ON -C build-dir=build/sanitize -e '.[dev]'
compiler=${CXX:-g++}
if [ $# -gt 0 ]; then
    set -- -m tools.fuzz "$@"
else
    set -- -m pytest -q -n 2 -p no:cacheprovider -k "not fork" \
        tests/test_native_attention.py tests/test_native_linear.py tests/test_native_program.py \
        tests/test_native_rows.py tests/test_native_streams.py tests/test_session.py tests/test_end_to_end.py tests/test_plan.py \
        tests/test_hostile_plan.py tests/test_plan_budget.py tests/test_plan_strangers.py
fi
# The sanitizer's allocator is not safe to use in a child forked while another thread allocates, so forks are left out.
# The interpreter is not instrumented, so the runtimes must be loaded before it; its own leaks are not ours.
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    $venv/bin/python "$@"
