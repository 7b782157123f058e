"""What the tensors of a graph hold, as exact expressions of sizes, indices and the inputs' elements.

    d = Derivation(graph)
    d.shape(tensor)                       (batch, sequence, 64)
    d.element(mask, (b, h, q, k))         attention_mask[b, k] * [q - k >= 0]

Operators that compute positions, masks, ids and shapes are followed; what any other operator computes is an element of
its own, of a shape that is derived where a rule says how. Nothing is read off runs, so what is derived holds at every
size and for every input.
"""

from __future__ import annotations

from nmcompile.derive.derivation import Derivation, checksum
from nmcompile.derive.value import Underived, Value

__all__ = ["Derivation", "Underived", "Value", "checksum"]
