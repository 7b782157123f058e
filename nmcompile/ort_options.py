"""What every onnxruntime session is opened with; imports onnxruntime only when one is."""

from __future__ import annotations

from typing import Any

# x86-64 CPUs without VNNI multiply u8 by s8 with an instruction that adds pairs of products in saturating 16-bit words.
# With this entry constant s8 weights beyond +-64 become u8 there, whose products are exact; elsewhere it does nothing.
EXACT = ("session.x64quantprecision", "1")


def session_options() -> Any:
    """onnxruntime.SessionOptions under which products of 8-bit integers do not saturate, on any CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry(*EXACT)
    return options


def open_foreign(model: str | bytes, threads: int = 0) -> Any:
    """A session on a model that is not ours, warnings off, by `threads` (0: onnxruntime's choice).

    With the entry onnxruntime refuses models in which two nodes read one weight; these open as they come, and may
    saturate. Raises what onnxruntime raises.
    """
    import onnxruntime as ort

    options, plain = session_options(), ort.SessionOptions()
    for item in (options, plain):
        item.log_severity_level, item.intra_op_num_threads = 4, threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's exceptions have no common base
        return ort.InferenceSession(model, plain, providers=["CPUExecutionProvider"])
