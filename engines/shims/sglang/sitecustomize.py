"""Lets SGLang run where there is no device: on PYTHONPATH for device cpu only (``engines.sglang``).

Real in such an engine: its HTTP server, tokenizer, scheduler, radix cache, grammars and LoRA manager, all unchanged.
Not real: its kernels. SGLang's own CPU kernels are not published; here attention, sampling and LoRA run as plain
PyTorch, which SGLang has for every layer, at a few tokens a second. So what it says and does is shown by it, how fast
it is is not.

Python imports this module when it starts, in every process of the engine. Beside it, ``sgl_kernel`` stands in for the
package of that name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _BeforeTorchvision(MetaPathFinder):
    """Declares two operators just before torchvision is imported.

    Its published build has them in a library for CUDA, which does not load beside PyTorch for the CPU; without them the
    import fails, and nobody calls them.
    """

    library: object = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            library = import_module("torch").library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            # They are gone with their library.
            type(self).library = library
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
