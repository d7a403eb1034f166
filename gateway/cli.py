"""The `forebay` command: reads what was typed, calls the room that does it, prints what came out.

Answers go to standard output, so that they can be piped; explanations and mistakes go to standard error. Exit code 0:
done, 1: it could not be done (one line says why and what to do), 2: the command line itself is wrong. `forebay diff`
alone is otherwise: 0: no difference, 2: there are some, 1: anything else.
Rooms are imported inside the commands: `forebay --help` should not wait for a database library.
"""

from __future__ import annotations

import platform
from enum import StrEnum
from importlib import metadata
from typing import Annotated

import typer

from gateway.commands.base import ConfigOption, configuration_file, group
from gateway.commands.config import config_app
from gateway.commands.engines import DeviceOption, ModelOption, engines_app
from gateway.commands.gitops import DiffCommand, apply, diff
from gateway.commands.keys import keys_app
from gateway.commands.limits import limits_app
from gateway.commands.route import route_app
from gateway.commands.tenants import audit, organisations_app, tenants_app
from gateway.commands.usage import explain, usage

app = group("An OpenAI-compatible gateway in front of inference engines.\n\nStart with `forebay serve`.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(tenants_app, name="tenants")
app.add_typer(organisations_app, name="organisations")
app.add_typer(limits_app, name="limits")
app.add_typer(route_app, name="route")
app.add_typer(engines_app, name="engines")
app.command("diff", cls=DiffCommand)(diff)
app.command("apply")(apply)
app.command("audit")(audit)
app.command("usage")(usage)
app.command("explain")(explain)


def main() -> None:
    """Run the command; the entry point of the distribution."""
    app(prog_name="forebay")


class Auth(StrEnum):
    """Who is let in."""

    KEYS = "keys"
    NONE = "none"


@app.command()
def serve(
    config: ConfigOption = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option("--upstream", help="An engine that runs already, http://host:port; repeat. No engine is started."),
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; 8000 by default.")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    auth: Annotated[Auth | None, typer.Option("--auth", help="`none` lets everybody in: for a laptop.")] = None,
) -> None:
    """Serve. Without any configuration: a small model on this machine's CPU, everything installed that it needs.

    Examples:

    - `forebay serve`
    - `forebay serve --device cuda --model Qwen/Qwen3-8B`
    - `forebay serve --upstream http://host:8000 --upstream http://host:8001`
    - `forebay serve --config forebay.yaml`
    """
    from gateway.local import make_plan
    from gateway.local import serve as serve_plan

    listen = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    said: dict[str, object] = {"listen": listen} if listen else {}
    if auth is not None:
        said["auth"] = auth.value
    if upstream:
        said |= {"upstreams": [{"url": url} for url in upstream], "engines": []}
    plan = make_plan(configuration_file(config), said, model, device and device.value)
    raise typer.Exit(serve_plan(plan))


@app.command()
def doctor(config: ConfigOption = None) -> None:
    """Say what is installed, what is missing and what to type. Changes nothing; exits with 1 when something is wrong.

    Example: `forebay doctor`
    """
    from gateway.doctor import State, examine

    wrong = False
    for finding in examine(configuration_file(config)):
        wrong |= finding.state is State.BAD
        typer.echo(f"{finding.state.value:>2}  {finding.subject}: {finding.detail}")
        if finding.remedy:
            typer.echo(f"      type: {finding.remedy}")
    if wrong:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the versions of the gateway and of Python."""
    try:
        release = metadata.version("forebay")
    except metadata.PackageNotFoundError:
        release = "(run from its source)"
    typer.echo(f"forebay {release}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")


if __name__ == "__main__":
    main()
