"""Tests run Triton kernels in its interpreter where there is no GPU; this makes that interpreter round to bfloat16.

It truncates instead (Triton 3.6 to 3.9), and multiplies matrices of bfloat16 as if their bits were numbers, which is
mended too. Other arithmetic on bfloat16 blocks is wrong there as well, so the kernels convert to float32 right after a
load, which is what they want anyway. Ranges end at Triton's own numbers, which Triton 3.6 with NumPy from 2.4 refuses.

Two things that it does anew for every function and every value are done once, for a sixth of the time of a kernel.
"""

from __future__ import annotations

import os


def use_interpreter() -> None:
    """Call before anything imports triton."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    dot = InterpreterBuilder.create_dot

    def rounded(handle):
        bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
        upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), upper), tl.bfloat16)

    def to_bfloat16(handle, dtype):
        return dtype.scalar == tl.bfloat16 and handle.dtype.scalar == tl.float32

    def cast_impl(self, handle, dtype):
        return rounded(handle) if to_bfloat16(handle, dtype) else cast(self, handle, dtype)

    def create_fp_to_fp(self, handle, dtype, mode):
        return rounded(handle) if to_bfloat16(handle, dtype) else convert(self, handle, dtype, mode)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *how):
        return dot(self, widened(a), widened(b), d, *how)

    patch_tensor = interpreter._patch_lang_tensor

    def indexable(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = indexable
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter._patch_lang = _once_a_launch(interpreter, interpreter._patch_lang)
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(InterpreterBuilder, name, cast_impl)


def _once_a_launch(interpreter, patch):
    """``patch`` puts the interpreter's functions into Triton's language; a function that a kernel calls finds them."""
    import triton.language as tl

    patched: set[int] = set()  # languages, while a kernel runs

    def patch_lang(fn):
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        outermost, scope = not patched, patch(fn)
        restore = scope.restore
        patched.update(languages)

        def restored():
            patched.clear()
            restore()

        if outermost:
            scope.restore = restored
        return scope

    return patch_lang


def _by_name(np_dtype):
    """``np_dtype`` of scalar types is looked up: it makes a table of all of them whenever it is asked."""
    import triton.language as tl

    known = {}

    def found(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return np_dtype(dtype)
        if element.name not in known:
            known[element.name] = np_dtype(element)
        return known[element.name]

    return found
