"""The kernels of `kernels/`, found where they are installed or beside the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from workbench.errors import install_with


def import_kernels() -> Any:
    """The kernels' modules (layers, block types); an engine's own interpreter has the checkout but not this room."""
    beside = Path(__file__).resolve().parents[2] / "kernels"
    try:
        import workbench_kernels  # noqa: F401
    except ModuleNotFoundError:
        if not (beside / "workbench_kernels").is_dir():
            raise install_with("workbench_kernels (kernel: workbench)", "pip install -e . in a checkout") from None
        sys.path.append(str(beside))
    import workbench_kernels.gguf.types
    import workbench_kernels.modules

    return workbench_kernels
