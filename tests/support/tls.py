"""TLS on loopback: contexts around a throw-away authority that only tests trust.

``certificates/localhost.pem`` holds a key and a certificate for ``localhost`` and 127.0.0.1, signed by
``authority.pem``. The authority's own key was not kept, so nothing else can be signed with it.
"""

from __future__ import annotations

import ssl
from pathlib import Path

CERTIFICATES = Path(__file__).resolve().parent / "certificates"
AUTHORITY = CERTIFICATES / "authority.pem"
LOCALHOST = CERTIFICATES / "localhost.pem"


def server_context() -> ssl.SSLContext:
    """Return the context of a server that proves to be ``localhost``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(LOCALHOST)
    return context


def client_context() -> ssl.SSLContext:
    """Return the context of a client that trusts the tests' authority and nobody else."""
    return ssl.create_default_context(cafile=AUTHORITY)
