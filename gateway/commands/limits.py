"""`forebay limits`: which limits apply to whom, asked of a gateway that runs."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from gateway.commands.base import ConfigOption, JsonOption, configuration_file, group, print_json, print_table
from gateway.settings import load

limits_app = group("What whom may use how much of.")


@limits_app.callback()
def _limits() -> None:
    """What whom may use how much of."""


@limits_app.command("explain")
def limits_explain(
    key: Annotated[str, typer.Argument(help="A key's id or name; - for a client without a key.")],
    model: Annotated[str, typer.Argument(help="A model's public name.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Tell which limits apply to a key on a model, where each is declared and what is left of it.

    Example: `forebay limits explain partner qwen3-8b`
    """
    from gateway.operate import Operator, find_gateway

    url, admin_key = find_gateway(load(configuration_file(config)))
    with contextlib.closing(Operator(url, admin_key)) as operator:
        told = operator.limits(None if key == "-" else key, model)
    if as_json:
        print_json(told)
        return
    whose = f"key {told['key']}, tenant {told['tenant']}" if told["key"] else "a client without a key"
    within = f", organisation {told['organisation']}" if told["organisation"] else ""
    typer.echo(f"{whose}{within}, on {told['model']}:")
    if told["standing"] != "store":
        typer.echo(f"the store that limits are shared through is lost; limits are {told['standing']} until it is back")
    if not told["data"]:
        typer.echo("nothing is limited")
        return
    print_table(("whose", "what", "declared in", "holds", "left", "full again in"), [_row(one) for one in told["data"]])


def _row(limit: dict[str, Any]) -> tuple[str, ...]:
    full = limit["full_again_in"]
    return (
        f"{limit['scope']} {limit['subject']}",
        limit["counts"],
        limit["declared_in"],
        f"{limit['holds']:,.6g}",
        f"{limit['left']:,.6g}",
        "as they end" if full is None else f"{full:.1f} s",
    )
