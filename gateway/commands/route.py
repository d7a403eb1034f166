"""`forebay route`: where a request would be sent, asked of a gateway that runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.commands.base import ConfigOption, JsonOption, configuration_file, group, print_json, print_table
from gateway.settings import load

route_app = group("Where requests are sent.")


@route_app.callback()
def _route() -> None:
    """Where requests are sent."""


@route_app.command("explain")
def route_explain(
    model: Annotated[str, typer.Argument(help="A model's public name.")],
    body: Annotated[
        Path | None, typer.Option("--body", help="A request's body as JSON: whose cache holds it counts then.")
    ] = None,
    path: Annotated[str, typer.Option("--path", help="The path it would be sent to.")] = "/v1/chat/completions",
    key: Annotated[
        str | None, typer.Option("--key", help="A key's name or id: which model a name stands for may depend on it.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Tell which engine would serve a request now, and what is thought of each of them. Nothing is sent.

    Examples:

    - `forebay route explain qwen3-8b`
    - `forebay route explain qwen3-8b --body request.json`
    """
    from gateway.operate import Operator, find_gateway

    content = _read(body) if body is not None else b""
    url, admin_key = find_gateway(load(configuration_file(config)))
    with contextlib.closing(Operator(url, admin_key)) as operator:
        told = operator.route(model, path, content, key)
    if as_json:
        print_json(told)
        return
    waiting = f"; {told['waiting']} wait" if told["waiting"] else ""
    named = f"{told['model']} ({told['served']})" if told["served"] != told["model"] else told["model"]
    typer.echo(f"{named} on {told['path']}: {told['endpoint'] or 'nobody has room'}{waiting}")
    if told["fallback"]:
        typer.echo(f"falls back on {', '.join(told['fallback'])}")
    heads = ("endpoint", "state", "in flight", "first token in", "cached", "cost")
    print_table(heads, [_row(one, told["blocks"]) for one in told["data"]])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read ({error.strerror})") from None


def _row(endpoint: dict[str, Any], blocks: int) -> tuple[str, ...]:
    weighed = "cost_ms" in endpoint
    cached = f"{endpoint['blocks_cached']} of {blocks} blocks" if weighed and blocks else ""
    if weighed and endpoint["home"]:
        cached = f"{cached}, home" if cached else "home"
    return (
        endpoint["name"],
        endpoint["state"],
        f"{endpoint['in_flight']} of {endpoint['limit']}",
        f"{endpoint['first_token_ms']:.0f} ms" if weighed else "",
        cached,
        f"{endpoint['cost_ms']:.0f} ms" if weighed else "",
    )
