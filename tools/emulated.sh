#!/bin/sh
# A short job on CPUs that this machine is not, by QEMU: AVX2 without VNNI (Haswell), and neither (Nehalem). It imports the
# engine, asks doctor for the kernels, and runs the tests marked `emulated`: each kernel that the CPU has, one committed
# model of each family against onnxruntime, and 8-bit products in onnxruntime.
#     sh tools/emulated.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
emulator=$(command -v qemu-x86_64 || command -v qemu-x86_64-static) || {
    echo "qemu-x86_64 is missing; install it (Debian: apt-get install qemu-user)" >&2
    exit 1
}
# They speak of the machine itself: OpenBLAS would run its kernels for that, and stop at the first unknown instruction.
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE NMCOMPILE_ISA
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1  # threads that wait by spinning starve each other under QEMU

on() {  # on CPU COMMAND...: without what QEMU does not know and would warn of
    model=$1
    shift
    "$emulator" -cpu "$model" "$@"
}

for cpu in "avx2 Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm" "scalar Nehalem"; do
    isa=${cpu% *}
    model=${cpu#* }
    echo "== ${model%%,*}: $isa kernels"
    said=$(on "$model" "$python" -c "from nmcompile.cli import main; main()" doctor)
    echo "$said"
    echo "$said" | grep -q "^kernels chosen *$isa\$" || {
        echo "doctor does not choose the $isa kernels on ${model%%,*}" >&2
        exit 1
    }
    on "$model" "$python" -m pytest -q -m emulated -p no:cacheprovider \
        --ignore-glob="tests/test_torch*" --ignore-glob="tests/test_training*"  # torch is not what is tried here
done
