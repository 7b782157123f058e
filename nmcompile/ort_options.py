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
