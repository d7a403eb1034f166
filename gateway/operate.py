"""How commands speak to a gateway that runs: where its admin listener is, with which key, and what can be asked there.

`forebay serve` leaves address and key in a file of its user's; elsewhere FOREBAY_ADMIN_URL and FOREBAY_ADMIN_KEY say
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx

from engines.minder import DRAINING, READY, SERVING, TOKEN_VARIABLE, State
from engines.minding import MinderClient, MinderError
from gateway.settings import Settings

URL_VARIABLE, KEY_VARIABLE = "FOREBAY_ADMIN_URL", "FOREBAY_ADMIN_KEY"
ANSWER_WITHIN = 15.0
"""Seconds the admin listener has to answer."""


class OperateError(Exception):
    """A running gateway cannot be spoken to, or refuses; the text says why and what to do."""


def admin_url(settings: Settings) -> str:
    """The URL of the admin listener for a program of this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.admin.host, settings.admin.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.admin.port}"


def pass_file(settings: Settings) -> Path:
    """Where a gateway that runs leaves the address of its admin listener and a key for it."""
    return settings.data_dir / "run" / f"admin-{settings.listen.port}.json"


def find_gateway(settings: Settings) -> tuple[str, str]:
    """Return admin URL and key: of the environment, of the configured port's gateway, or of the only one there is."""
    url, key = os.environ.get(URL_VARIABLE), os.environ.get(KEY_VARIABLE)
    if url and key:
        return url, key
    if url or key:
        raise OperateError(f"{URL_VARIABLE} and {KEY_VARIABLE} go together; set both or none")
    file = pass_file(settings)
    if not file.exists():
        others = sorted(file.parent.glob("admin-*.json"))
        if len(others) > 1:
            ports = [one.stem.removeprefix("admin-") for one in others]
            raise OperateError(
                f"several gateways run here (ports {', '.join(ports)}); say which, for example:"
                f" FOREBAY_LISTEN__PORT={ports[0]} forebay engines list"
            )
        if not others:
            raise OperateError(
                f"no gateway of this data directory ({settings.data_dir}) runs; start one with `forebay serve`, or say"
                f" where it is with {URL_VARIABLE} and {KEY_VARIABLE} (a key of `forebay keys create --admin`)"
            )
        file = others[0]
    try:
        told = json.loads(file.read_text())
        return str(told["url"]), str(told["key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OperateError(f"{file} cannot be read; are you the user who runs the gateway?") from None


class Operator:
    """The admin API of one gateway."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=ANSWER_WITHIN, trust_env=False)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def endpoints(self) -> list[dict[str, Any]]:
        """Every endpoint, as `GET /admin/endpoints` tells them."""
        listed: list[dict[str, Any]] = self._ask("GET", "/admin/endpoints")["data"]
        return listed

    def endpoint(self, name: str) -> dict[str, Any]:
        """One endpoint. OperateError when there is none of that name."""
        there = self.endpoints()
        for endpoint in there:
            if endpoint["name"] == name:
                return endpoint
        raise OperateError(f"there is no engine {name!r}; there are: {', '.join(e['name'] for e in there) or 'none'}")

    def act(self, name: str, action: str, **fields: float) -> dict[str, Any]:
        """Begin something with an endpoint."""
        return self._ask("POST", f"/admin/endpoints/{quote(name, safe='')}/{action}", fields or None)

    def limits(self, key: str | None, model: str) -> dict[str, Any]:
        """Which limits apply, as `GET /admin/limits` tells them. OperateError where there is no such key or model."""
        asked = {"model": model} | ({"key": key} if key is not None else {})
        return self._ask("GET", f"/admin/limits?{urlencode(asked)}")

    def route(self, model: str, path: str, body: bytes, key: str | None = None) -> dict[str, Any]:
        """Where a request would be sent, as `POST /admin/route` tells it. OperateError where there is no such model."""
        query = {"model": model, "path": path} | ({"key": key} if key is not None else {})
        return self._ask("POST", f"/admin/route?{urlencode(query)}", content=body)

    def explain(self, request_id: str) -> dict[str, Any]:
        """One request, as `GET /admin/requests/ID` tells it. OperateError when it is not known."""
        return self._ask("GET", f"/admin/requests/{quote(request_id, safe='')}")

    def _ask(self, method: str, path: str, body: object = None, content: bytes | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=body, content=content)
        except httpx.HTTPError as error:
            raise OperateError(
                f"no gateway answers at {self.url} ({error or type(error).__name__}); start it with `forebay serve`"
            ) from None
        try:
            tree: dict[str, Any] = answer.json()
            if answer.is_success:
                return tree
            told = tree["error"]["message"]
        except (ValueError, KeyError, TypeError):
            told = f"{answer.status_code} for {method} {path}"
        raise OperateError(f"the gateway at {self.url} refused: {told}")


RESTARTING_WITHIN = 1800.0
"""Seconds a restart may take; a large model loads slowly."""
LOOK = 0.3
"""Seconds between two looks at what was begun."""

Tell = Callable[[str], None]


def wait_drained(operator: Operator, name: str, within: float, tell: Tell) -> None:
    """Wait until an endpoint that is drained works on nothing. OperateError when requests are left then."""
    until, before = time.monotonic() + within, None
    while True:
        endpoint = operator.endpoint(name)
        left, minder = endpoint["in_flight"], endpoint["minder"] or {}
        if not left and (minder.get("drained", True) or not _is_drained_by_all(endpoint)):
            return
        if time.monotonic() > until:
            raise OperateError(
                f"{name} is not drained after {within:.0f} s (under way: {left or 'some of other replicas'}) and gets"
                f" no new requests; wait longer, or let it have them again: forebay engines uncordon {name}"
            )
        if left != before:
            tell(f"{name}: requests under way: {left}" if left else f"{name}: waiting for other replicas")
        before = left
        time.sleep(LOOK)


def _is_drained_by_all(endpoint: dict[str, Any]) -> bool:
    """Whether a minder will tell when every replica is through; one whose engine does not work was not asked to."""
    phase = (endpoint["minder"] or {}).get("phase")
    return phase == DRAINING or (phase in (READY, SERVING) and "command" not in endpoint["held_by"])


def wait_restarted(operator: Operator, name: str, starts: int, tell: Tell) -> None:
    """Wait until an endpoint serves in a later start than number ``starts``. OperateError when it does not come."""
    until, before = time.monotonic() + RESTARTING_WITHIN, ""
    while True:
        endpoint = operator.endpoint(name)
        minder = endpoint["minder"] or {}
        begun = minder.get("starts", 0) > starts
        if begun and endpoint["state"] == "serving":
            return
        if begun and endpoint["state"] in ("failed", "stopped", "waiting"):
            raise OperateError(f"{minder['message'] or name + ' ' + endpoint['state']}; forebay engines logs {name}")
        if time.monotonic() > until:
            raise OperateError(f"{name} does not serve after {RESTARTING_WITHIN:.0f} s; forebay engines logs {name}")
        now = minder.get("progress") or endpoint["state"]
        if now != before:
            tell(f"{name}: {now}")
        before = now
        time.sleep(LOOK)


def find_minder(settings: Settings, name: str) -> str:
    """Return where an engine's minder is spoken to: as a gateway that runs tells, else by the sockets that lie here."""
    try:
        with operating(settings) as operator:
            minder = operator.endpoint(name)["minder"]
    except OperateError as error:
        for control in sorted((settings.data_dir.absolute() / "run").glob("*.control")):
            if asyncio.run(_name_at(control)) == name:
                return f"unix:{control}"
        raise error from None
    if minder is None:
        raise OperateError(f"{name} has no minder: it is only known by its URL; look where it runs")
    return str(minder["address"])


async def _name_at(control: Path) -> str | None:
    async with MinderClient(f"unix:{control}") as client:
        with contextlib.suppress(MinderError):
            return (await client.call("GET", "/state")).name
    return None


def minder_client(address: str) -> MinderClient:
    """Speak to a minder; one on TCP asks for the token of the environment."""
    return MinderClient(address, os.environ.get(TOKEN_VARIABLE))


async def show_logs(address: str, lines: int, follow: bool, tell: Tell) -> None:
    """Tell an engine's last lines, and those to come."""
    async with minder_client(address) as client, contextlib.aclosing(client.logs(lines, follow=follow)) as told:
        async for line in told:
            tell(line)


async def stop_engine(address: str, drain: float, grace: float) -> str:
    """Stop an engine and its minder in order; return how it ended."""
    async with minder_client(address) as client, contextlib.aclosing(client.events()) as told:
        # Heard from before it is told: an engine may end, and its minder leave, at once.
        await anext(told, None)
        state = await client.call("POST", "/stop", drain=drain, grace=grace, leave=True)
        with contextlib.suppress(MinderError):
            async for item in told:
                state = item if isinstance(item, State) else state
    return state.message or f"{state.name} stopped"


@contextlib.contextmanager
def operating(settings: Settings) -> Iterator[Operator]:
    """Speak to the gateway that runs. OperateError when there is none."""
    operator = Operator(*find_gateway(settings))
    try:
        yield operator
    finally:
        operator.close()
