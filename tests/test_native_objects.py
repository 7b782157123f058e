"""No symbol of a kernel object may be weak: the linker could pick AVX512 code for every CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent.parent / "native"
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx512vnni": [
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
    ],
}  # fmt: skip


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("nm"), reason="needs g++ and nm")
@pytest.mark.parametrize("family", sorted(p.name for p in (NATIVE / "kernels").iterdir() if p.is_dir()))
def test_kernel_objects_share_nothing(family: str, tmp_path: Path) -> None:
    for isa, flags in FLAGS.items():
        source = NATIVE / "kernels" / family / f"{family}_{isa}.cc"
        target = tmp_path / "kernel.o"
        # -O0: nothing is inlined away, so every shared function would show
        command = [
            "g++",
            "-std=c++17",
            "-O0",
            "-w",
            "-fno-exceptions",
            "-fno-rtti",
            *flags,
            "-c",
            str(source),
        ]
        subprocess.run([*command, "-o", str(target)], check=True)
        lines = subprocess.run(
            ["nm", "-C", str(target)], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        kinds = {line[19:]: line[17] for line in lines if len(line) > 19}
        assert not {name for name, kind in kinds.items() if kind in "WwVvu"}
        public = {name for name, kind in kinds.items() if kind in "TDBR"}
        assert len(public) == 1, public  # the table of kernels
