"""`forebay usage` and `forebay explain`: what was used, and what became of one request."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gateway.commands.base import CommandError, ConfigOption, configuration_file, print_json
from gateway.settings import load


def usage(
    by: Annotated[
        str, typer.Option("--by", help="Any of key, tenant (or team), organisation, model, day, outcome, endpoint …")
    ] = "key,model",
    since: Annotated[str | None, typer.Option("--since", help="2026-11-01 (UTC), or so long ago: 7d, 12h.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="The same; a day is counted in.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="One key, by its id or its name.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", "--team", help="One tenant.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="One model.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Every request by itself instead of sums; needs --csv.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write CSV there; - is standard output.")] = None,
    config: ConfigOption = None,
) -> None:
    """Sum up what was used, out of the state database: requests, tokens by kind, cost.

    Examples:

    - `forebay usage --by tenant,day --since 7d`
    - `forebay usage --by key,model --since 2026-11-01 --until 2026-11-30 --csv november.csv`
    - `forebay usage --rows --team research --csv -`
    """
    from gateway.report import rows_as_csv, sums_as_csv, sums_as_table, write_csv
    from gateway.state.database import upgrade
    from gateway.state.usage import UsageStore, Wanted, read_by, read_moment

    if rows and csv is None:
        raise CommandError("--rows is for files and pipes: add --csv FILE, or --csv - for standard output")
    now = datetime.now(UTC)
    try:
        groups = read_by(by)
        wanted = Wanted(
            since=read_moment(since, now) if since else None,
            until=read_moment(until, now, end=True) if until else None,
            key=key,
            tenant=tenant,
            model=model,
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    settings = load(configuration_file(config))
    upgrade(settings.state_url)
    with contextlib.closing(UsageStore(settings.state_url)) as store:
        if csv is None:
            Console().print(sums_as_table(store, groups, wanted))
        else:
            write_csv(rows_as_csv(store, wanted) if rows else sums_as_csv(store, groups, wanted), csv)


def explain(
    request_id: Annotated[str, typer.Argument(help="The request's id, req_…, as `x-request-id` and the log have it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    config: ConfigOption = None,
) -> None:
    """Tell what became of one request: who sent it, which engine served it and why, where its time went.

    Asks the gateway that runs; where none does, the ledger in the state database.

    Example: `forebay explain req_0b6f3a5d2c9e4f17a8b1c2d3e4f5a6b7`
    """
    from gateway.report import explain_in_text, find_request

    told = find_request(load(configuration_file(config)), request_id)
    if as_json:
        print_json(told)
    else:
        typer.echo(explain_in_text(told))
