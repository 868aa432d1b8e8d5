"""Make Triton's interpreter work with NumPy 2.4, which no longer turns arrays of one element into numbers."""

import os
from importlib.util import find_spec

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import triton.runtime.interpreter as interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index
