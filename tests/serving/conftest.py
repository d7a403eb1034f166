"""What the tests of serving share."""

from __future__ import annotations

from tests.support.gateway import face, gateway, start_gateway

__all__ = ["face", "gateway", "start_gateway"]
