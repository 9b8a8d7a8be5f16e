"""What the Python files of a checkpoint say of its head; they are read, not run."""

from __future__ import annotations

import ast
from pathlib import Path

from conch.store.manifest import HeadActivation

_ACTIVATIONS: dict[str, HeadActivation] = {
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Tanh": "tanh",
    "SELU": "selu",
}


def activation_in_code(folder: Path, head: str) -> tuple[HeadActivation | None, str]:
    """Return the activation in `self.HEAD = nn.Sequential(...)` beside linear layers, and where it was read.

    head: the attribute, with which the names of the head's tensors begin.

    None, with the reason, where the folder has no such code, or several activations.
    """
    found: dict[HeadActivation, str] = {}
    files = sorted(folder.glob("*.py"))
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or head not in map(_name, node.targets):
                continue
            made = node.value
            if isinstance(made, ast.Call) and _name(made.func) == "Sequential":
                parts = [_name(part.func) for part in ast.walk(made) if isinstance(part, ast.Call)]
                if "Linear" in parts:
                    found |= {_ACTIVATIONS[part]: file.name for part in parts if part in _ACTIVATIONS}
    if len(found) == 1:
        ((activation, name),) = found.items()
        return activation, name
    if found:
        return None, f"the code beside the weights has several: {', '.join(sorted(found))}"
    return None, "the code beside the weights does not say" if files else "no code beside the weights"


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
