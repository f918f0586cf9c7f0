"""Stand-in for mmcv's compiled operators where mmcv-lite is installed, which has none.

mmdet imports ``mmcv.ops`` at import time, and each of its modules looks its operators up in ``mmcv._ext``. SOLO and SOLOv2 run none of
them, so it is enough that the look-up succeeds. An operator that is run after all raises an error that says what is missing.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NAME = "mmcv._ext"


class _NoOperators(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{_NAME}.{name} is a compiled operator, and mmcv-lite has none; install mmcv built with operators.")

        return missing


def install() -> None:
    """Put the stand-in in the place of ``mmcv._ext`` unless the compiled library is there (idempotent). Call before importing mmdet."""
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return
    import mmcv

    stub = _NoOperators(_NAME)
    stub.__spec__ = importlib.machinery.ModuleSpec(_NAME, None)
    sys.modules[_NAME] = mmcv._ext = stub
