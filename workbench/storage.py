"""Places beyond this machine, as fsspec reaches them (`s3://bucket/folder`), and what keeps them from being reached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from workbench.errors import UserError, importing, install_with

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""Packages for object storage, which has no folders to be made: `makedirs` would make a misspelt bucket."""


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL or a local path, and the path in it."""
    with importing(f"what reads {url}", "pip install fsspec"):
        import fsspec
    files, path = fsspec.core.url_to_fs(url)
    return files, str(path)


def make_folder(files: Any, url: str, path: str) -> None:
    """The folder, where there is such a thing."""
    if not PACKAGES.get(url.partition("://")[0]):
        files.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def reaching(url: str, what: str, option: str) -> Iterator[None]:
    """Every file system raises errors of its own; what they have in common is the place, and who must act. `what` is
    done there, as `read rows`; `option` names another place."""
    scheme = url.partition("://")[0]
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = PACKAGES.get(scheme)
        if package is None:
            raise UserError(f"{url}: cannot {what} there: {brief(error)}") from error
        raise install_with(f"what reaches {scheme}://", f"pip install {package}") from error
    except FileNotFoundError as error:
        raise UserError(f"{url}: cannot {what} there: no such file or bucket. Check the URL") from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol" in str(error):
            raise UserError(f"{url}: unknown kind of URL '{scheme}'. Use a folder or s3://bucket/folder") from error
        raise UserError(
            f"{url}: cannot {what} there ({type(error).__name__}: {brief(error)}). Check the URL, your "
            f"credentials and what they permit, or name another {option}"
        ) from error


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
