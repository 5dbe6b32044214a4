"""What several graph rewrites need: one value taking another's place."""

from __future__ import annotations

import onnx_ir as ir


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Lets ``new`` stand wherever ``old`` stood, graph outputs included, under its name, shape and type."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name, old.name = old.name, None
    new.name = name
