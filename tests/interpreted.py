"""Kernels under Triton's interpreter, in a process of its own.

TRITON_INTERPRET counts when Triton is imported, and would hold for everything else in this process that uses Triton.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from graphshard.execution import Kernel


class Interpreter:
    """A process that runs kernels on CPU tensors. ``close`` ends it."""

    def __init__(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::RuntimeWarning", __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, kernel: Kernel, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The results, and the arguments as the kernel left them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((kernel, tuple(arguments)), self._process.stdin)
        self._process.stdin.flush()
        results, left, error = pickle.load(self._process.stdout)
        assert not error, f"{error}\n{kernel.source}"
        return results, left

    def close(self) -> None:
        """End the process: it ends with its input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _type_comparisons() -> None:
    """The interpreter (triton 3.9.0) gives what compares two scalars the operands' type, and so cannot combine it with
    a block of bools."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.binary_op

    def typed(self: Any, left: Any, right: Any, operation: Any) -> Any:
        made = plain(self, left, right, operation)
        return TensorHandle(made.data, tl.int1) if made.data.dtype == np.bool_ else made

    InterpreterBuilder.binary_op = typed


def _numpy_2() -> None:
    """The interpreter of triton before 3.9 was written for a numpy that made an integer of an array of one element, and
    of -1 the largest unsigned one."""
    import numpy as np
    from triton.runtime import interpreter

    patch, ones = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.get_all_ones_value

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def all_ones(self: Any, kind: Any) -> Any:
        numbers = interpreter._get_np_dtype(kind)
        if not np.issubdtype(numbers, np.unsignedinteger):
            return ones(self, kind)
        return interpreter.TensorHandle(np.full(1, np.iinfo(numbers).max, numbers), kind.scalar)

    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.get_all_ones_value = patched, all_ones


def _serve() -> None:
    import traceback

    from graphshard.codegen.triton_compile import load_kernel

    torch.set_num_threads(1)
    _type_comparisons()
    _numpy_2()
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # a kernel that prints does not break the answers
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                kernel, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                results = load_kernel(kernel, folder)(*arguments)
                answer = (results if isinstance(results, tuple) else (results,), arguments, "")
            except Exception:
                answer = ((), (), traceback.format_exc())
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    _serve()
