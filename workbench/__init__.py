"""Quantize a language model every way, run it in every engine, believe the numbers.

    import workbench as wb

    wb.run("recipes/tiny.yaml").table          # what `workbench run` prints
    wb.table("results").to_pandas()            # stored rows as a data frame
    wb.recommend("results", memory="8GiB")     # a choice, its command, and why

The functions are those of `workbench.api`, which is imported when the first of them is asked for: importing the package
imports no engine and no library.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.api import Run as Run
    from workbench.api import compare as compare
    from workbench.api import cost as cost
    from workbench.api import load as load
    from workbench.api import plan as plan
    from workbench.api import profile as profile
    from workbench.api import profile_endpoint as profile_endpoint
    from workbench.api import quantize as quantize
    from workbench.api import recommend as recommend
    from workbench.api import rows as rows
    from workbench.api import run as run
    from workbench.api import table as table
    from workbench.errors import UserError as UserError

__version__ = "0.2.0"
__all__ = (
    *("Run", "UserError", "compare", "cost", "load", "plan", "profile", "profile_endpoint", "quantize", "recommend"),
    *("rows", "run", "table", "__version__"),
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'workbench' has no attribute '{name}'")
    from workbench import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`quantize`, `profile` and `plan` are functions here and folders beside: what imports from a folder must not put
    it in the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
