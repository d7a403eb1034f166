"""`forebay config`: check and describe the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.base import DEFAULT_FILE, group, print_json
from gateway.settings import json_schema, load, warnings_about

config_app = group("Check and describe `forebay.yaml`.")


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="The file to check.")] = DEFAULT_FILE,
) -> None:
    """Read a configuration as `serve` would and tell every mistake in it.

    Example: `forebay config check /etc/forebay/forebay.yaml`
    """
    from gateway.state.database import open_database

    settings = load(file)
    open_database(settings.state_url).dispose()
    for warning in warnings_about(settings):
        typer.echo(f"forebay: {warning}", err=True)
    typer.echo(f"{file}: fine")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration, for editors.

    Example: `forebay config schema > forebay.schema.json`, and as first line of your file
    `# yaml-language-server: $schema=forebay.schema.json`
    """
    print_json(json_schema())
