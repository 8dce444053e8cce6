"""Where a server is, with which key, and whether something may be sent there."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from workbench.errors import UserError, short


@dataclass(frozen=True)
class Address:
    """The root of a server's API, as `http://127.0.0.1:8000/v1`."""

    url: str
    host: str
    key: str = field(default="", repr=False)
    """Sent as a bearer token, and nowhere else: neither stored nor shown."""

    @property
    def loopback(self) -> bool:
        """Whether it is this machine, by an address that cannot be anybody else's."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def root(self) -> str:
        """Where a server has what is not of this API."""
        return self.url.removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def without_key(self, text: str) -> str:
        """A server's words, should they repeat the key."""
        return text.replace(self.key, "***") if self.key else text


def address_of(url: str, key_variable: str | None = None, environment: Mapping[str, str] = os.environ) -> Address:
    """The address that a person typed, `/v1` added where no path is named. Raises `UserError`."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--endpoint {short(url)}: no address of a server. Write it as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"--endpoint: {parts.scheme}://{host} with a user, a query or a fragment, which would be stored with the "
            "rows. Give the address alone, and a key by --api-key-env VAR"
        )
    return Address(
        f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}", host, _key(key_variable, environment)
    )


def _key(variable: str | None, environment: Mapping[str, str]) -> str:
    if variable is None:
        return ""
    key = environment.get(variable, "").strip()
    if not key:
        # Somebody may have given the key itself: it is not repeated.
        known = variable if variable.isidentifier() and len(variable) <= 40 else "VAR"
        raise UserError(
            f"--api-key-env names a variable that is not set. `export {known}=...`, then name it: --api-key-env {known}"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {variable} holds characters that no HTTP header takes. Set it anew")
    return key
