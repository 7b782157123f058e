"""The runtimes that are measured: what pip installs, in which forms a model goes in. Each has a worker of its own here.

A worker runs in its peer's environment: it imports that peer, numpy, the standard library and `serve`, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """A form of the model. `pattern`: the blocks (outputs x inputs) that the peer skips, None: zeros gain it nothing.

    `candidates` are names of files that do the same: a short trial picks the fastest for each shape.
    """

    name: str
    pattern: str | None = None
    candidates: tuple[str, ...] = ("model",)


@dataclass(frozen=True)
class Peer:
    """`packages` are installed with what they need, `bare` without; neither: the peer runs in this environment.

    fixed: it takes models whose sizes are numbers.
    """

    name: str
    forms: tuple[Form, ...]
    packages: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def module(self) -> str:
        """The worker."""
        return f"{__name__}.{self.name.replace('-', '_')}"


OURS = "nmcompile"
PEERS = (
    Peer(OURS, (Form("int8", "2x4"),)),
    Peer(
        "onnxruntime",
        (Form("fp32"), Form("int8", candidates=("qdq", "qoperator"))),
        # onnx and sympy are for onnxruntime.quantization
        ("onnxruntime==1.31.1", "onnx", "sympy", "numpy"),
    ),
    Peer("openvino", (Form("fp32"), Form("int8")), ("openvino>=2026.4", "nncf>=3.0", "onnx")),
    Peer("deepsparse", (Form("fp32"), Form("int8", "1x4")), ("deepsparse==1.8.0",), fixed=True),
    # The engine and its libraries are in the wheel; what the wheel asks for are the other halves of that project.
    Peer(
        "neural-engine",
        (Form("int8", "4x1", ("dense", "sparse")),),
        ("numpy<2",),
        ("intel-extension-for-transformers==1.4.2",),
    ),
    # A version that has a CPU build under its plain name: others bring gigabytes of CUDA.
    Peer("pytorch", (Form("fp32"), Form("int8")), ("torch==2.13.0", "numpy")),
)
