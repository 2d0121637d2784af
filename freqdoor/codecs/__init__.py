"""Codecs: any network of CompressAI's protocol behind one adapter, the bundled one, files in and out.

CompressAI imports all that any of its parts may need, which takes three seconds: point clouds' PyTorch Geometric, and
through torchvision PyTorch's compiler. Nothing of that is needed here. While CompressAI is imported, stand-ins are in
the place of those libraries; afterwards they are gone, and whoever uses the libraries gets them whole. Only
CompressAI's registry of transforms lacks torchvision's and PyTorch Geometric's.
"""

import importlib
import sys
import types
import warnings
from typing import Any

LATER = (
    "scipy.stats",
    "torchvision",
    "torchvision.transforms",
    "torch_geometric",
    "torch_geometric.transforms",
    "compressai.datasets",
    "compressai.transforms",
)


class _StandIn(types.ModuleType):
    """An empty module that becomes the real one when something is asked of it after CompressAI was imported."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") or sys.modules.get(self.__name__) is self:
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.__name__), attribute)


def _import_compressai() -> None:
    stand_ins = {name: _StandIn(name) for name in LATER if name not in sys.modules}
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent in stand_ins:
            setattr(stand_ins[parent], child, module)
    sys.modules.update(stand_ins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch at what CompressAI does while it is imported
            import compressai.models
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent == "compressai":
            setattr(compressai, child, module)


if "compressai" not in sys.modules:
    _import_compressai()
