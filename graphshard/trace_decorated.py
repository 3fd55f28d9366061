"""Whether autocast that was made before capture is on: one for CUDA, where there is none, says that it is off.

What it was asked for is then written in the decorator alone, which is read.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FrameType
from typing import Any


def decorated(frame: FrameType) -> Any:
    """The function that torch's decorator is about to call in ``frame``; None: it is another frame."""
    return frame.f_locals.get("func") if frame.f_code.co_name == "decorate_autocast" else None


def asks_for_autocast(function: Any) -> bool | None:
    """Whether the decorator ``autocast(...)`` of a function asks for it to be on; None: its text does not tell."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    decorators = getattr(definition, "decorator_list", ())
    made = [d for d in decorators if isinstance(d, ast.Call) and ast.unparse(d.func).endswith("autocast")]
    if len(made) != 1 or any(word.arg is None for word in made[0].keywords):
        return None
    args, keywords = made[0].args, made[0].keywords
    # torch.autocast(device, dtype, enabled), torch.cuda.amp.autocast(enabled, dtype)
    asked = [word.value for word in keywords if word.arg == "enabled"] or args[2:3]
    asked = asked or [a for a in args[:1] if not (isinstance(a, ast.Constant) and isinstance(a.value, str))]
    values = [value.value if isinstance(value, ast.Constant) else None for value in asked]
    return all(values) if all(isinstance(value, bool) for value in values) else None
