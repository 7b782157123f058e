#!/bin/sh
# The engine on Arm: built by a cross compiler, run by QEMU in an Arm Python of Debian's. On a CPU with i8mm and one with dot
# products alone, doctor must choose the kernels of each; on the first the tests of kernels run, which hold every instruction
# set to the scalar kernels bit for bit, and one committed model of each family is held to onnxruntime.
#     sh tools/arm.sh [PYTHON]                                   of the version that Debian has
# Needs Debian, and once, as root: dpkg --add-architecture arm64; apt-get update; apt-get install cmake g++-aarch64-linux-gnu
# qemu-user
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
work=$PWD/build/arm
mkdir -p "$work"

need() {  # COMMAND PACKAGE
    command -v "$1" > /dev/null || {
        echo "$1 is missing; install it (Debian: apt-get install $2)" >&2
        exit 1
    }
}
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
need cmake cmake
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [ ! -e "$work/root/usr/bin/python$version" ]; then
    echo "== Python $version for Arm"
    mkdir -p "$work/debs"
    (cd "$work/debs" && apt-get download -qq "python$version-minimal:arm64" "libpython$version-minimal:arm64" \
        "libpython$version-stdlib:arm64" "libpython$version-dev:arm64" libc6:arm64 libgcc-s1:arm64 libstdc++6:arm64 \
        zlib1g:arm64 libexpat1:arm64 libssl3:arm64 libffi8:arm64 libbz2-1.0:arm64 liblzma5:arm64 libuuid1:arm64 \
        libsqlite3-0:arm64 libcrypt1:arm64) || {
        echo "Debian's Python $version for Arm cannot be had; run dpkg --add-architecture arm64 and apt-get update" >&2
        exit 1
    }
    for package in "$work"/debs/*.deb; do dpkg -x "$package" "$work/root"; done
fi
if [ ! -e "$work/site/numpy" ]; then
    echo "== packages for Arm"
    # onnxruntime 1.28 and later end in a fault when they are imported under QEMU 7.2
    "$python" -m pip install -q --target "$work/site" --only-binary=:all: --python-version "$version" \
        --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_26_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        numpy onnx "onnxruntime<1.28" onnx-graphsurgeon ml_dtypes click rich pytest hypothesis
fi

echo "== cross compilation"
cat > "$work/toolchain.cmake" << 'END'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
END
"$python" -m pip install -q --target "$work/host" --upgrade nanobind
include=$work/root/usr/include
export PYTHONPATH="$work/host"
cmake -S . -B "$work/native" -DCMAKE_TOOLCHAIN_FILE="$work/toolchain.cmake" -DPython_EXECUTABLE="$(command -v "$python")" \
    -DPython_INCLUDE_DIR="$include/python$version" -DCMAKE_CXX_FLAGS="-idirafter $include" > "$work/cmake.log"
cmake --build "$work/native" -j "$(nproc)" > "$work/build.log" 2>&1 || {
    tail -40 "$work/build.log" >&2
    exit 1
}

unset PYTHONPATH
tree=$work/tree
rm -rf "$tree"
mkdir -p "$tree"
cp -rL nmcompile "$tree/nmcompile"
rm -f "$tree"/nmcompile/_native*.so
cp "$work"/native/_native*.so "$tree/nmcompile/_native.so"
cp -r tests models tools pyproject.toml "$tree"

on() {  # on CPU ARGUMENTS... of Python
    model=$1
    shift
    qemu-aarch64 -L "$work/root" -E LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu -E PYTHONPATH="$tree:$work/site" \
        -E OMP_NUM_THREADS=1 -E OPENBLAS_NUM_THREADS=1 -cpu "$model" "$work/root/usr/bin/python$version" "$@"
}

cd "$tree"
for cpu in "i8mm max" "dotprod cortex-a76" "scalar cortex-a72"; do
    isa=${cpu% *}
    echo "== ${cpu#* }: $isa kernels"
    said=$(on "${cpu#* }" -c "from nmcompile.cli import main; main()" doctor)
    echo "$said"
    echo "$said" | grep -q "^kernels chosen *$isa\$" || {
        echo "doctor does not choose the $isa kernels on ${cpu#* }" >&2
        exit 1
    }
done
on max -m pytest -q -m emulated -p no:cacheprovider tests/test_native_linear.py tests/test_native_attention.py \
    tests/test_native_rows.py tests/test_native_streams.py
on max -m pytest -q -m emulated -p no:cacheprovider tests/test_end_to_end.py -k agrees_with_its_qdq_graph
