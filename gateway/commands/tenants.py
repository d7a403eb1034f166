"""`forebay tenants`, `forebay organisations` and `forebay audit`, straight in the database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from gateway.commands.base import (
    ConfigOption,
    JsonOption,
    group,
    managing,
    mapping,
    past,
    print_json,
    print_table,
)
from gateway.settings import ConfigError, explain

if TYPE_CHECKING:
    from gateway.state.tenants import GroupKind

tenants_app = group("Say what the keys of a tenant may use together. A team is a tenant.")
organisations_app = group("Say what the tenants of an organisation may use together.")

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="What its keys call it.")]
OrganisationName = Annotated[str, typer.Argument(metavar="ORGANISATION", help="What its tenants call it.")]
LimitsOption = Annotated[str | None, typer.Option("--limits", help="What all together may use, as YAML or JSON.")]
TenantsOption = Annotated[str | None, typer.Option("--tenants", help="What each tenant may use, as YAML or JSON.")]
KeysOption = Annotated[str | None, typer.Option("--keys", help="What each key may use, as YAML or JSON.")]


@tenants_app.command("list")
def tenants_list(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the tenants of the file and of the database. Keys may name others: of these nothing is said.

    Example: `forebay tenants list`
    """
    _list("tenant", config, as_json)


@tenants_app.command("set")
def tenants_set(
    tenant: TenantName,
    organisation: Annotated[
        str | None, typer.Option("--organisation", help="Which it belongs to; an empty word: to none.")
    ] = None,
    limits: LimitsOption = None,
    keys: KeysOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a tenant, or change it; what is not given stays, and `none` takes limits away.

    Example: `forebay tenants set research --organisation acme --limits '{tokens: 1M/m}' --keys '{requests: 60/m}'`
    """
    given = {"organisation": organisation} if organisation is not None else {}
    _set("tenant", tenant, given, {"limits": limits, "keys": keys}, config)


@tenants_app.command("delete")
def tenants_delete(tenant: TenantName, config: ConfigOption = None) -> None:
    """Delete a tenant. Not while keys belong to it.

    Example: `forebay tenants delete research`
    """
    _delete("tenant", tenant, config)


@organisations_app.command("list")
def organisations_list(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the organisations of the file and of the database.

    Example: `forebay organisations list`
    """
    _list("organisation", config, as_json)


@organisations_app.command("set")
def organisations_set(
    organisation: OrganisationName,
    limits: LimitsOption = None,
    tenants: TenantsOption = None,
    keys: KeysOption = None,
    config: ConfigOption = None,
) -> None:
    """Make an organisation, or change it; what is not given stays, and `none` takes limits away.

    Example: `forebay organisations set acme --limits '{budgets: {usd: 20000}}'`
    """
    _set("organisation", organisation, {}, {"limits": limits, "tenants": tenants, "keys": keys}, config)


@organisations_app.command("delete")
def organisations_delete(organisation: OrganisationName, config: ConfigOption = None) -> None:
    """Delete an organisation. Not while tenants belong to it.

    Example: `forebay organisations delete acme`
    """
    _delete("organisation", organisation, config)


def _list(kind: GroupKind, config: Path | None, as_json: bool) -> None:
    with managing(config) as management:
        rows = [one.as_json() for one in management.groups(kind)]
    if as_json:
        print_json(rows)
        return
    belongs = ("organisation",) if kind == "tenant" else ()
    print_table(("name", *belongs, "limits", "from"), (_row(row, belongs) for row in rows))


def _row(row: dict[str, Any], belongs: tuple[str, ...]) -> tuple[str, ...]:
    limits = {name: row[name] for name in ("limits", "tenants", "keys") if row.get(name)}
    return row["name"], *(row[name] or "-" for name in belongs), json.dumps(limits) if limits else "-", row["source"]


def _set(kind: GroupKind, name: str, given: dict[str, str], limits: dict[str, str | None], config: Path | None) -> None:
    from gateway.state.database import NoSuch
    from gateway.state.tenants import ENTRIES, entry_of

    said: dict[str, Any] = {part: value or None for part, value in given.items()}
    said |= {part: mapping(f"--{part}", text) or {} for part, text in limits.items() if text is not None}
    with managing(config) as management:
        try:
            before = management.group(kind, name)
        except NoSuch:
            before = None
        try:
            entry = entry_of(kind, {**(before.fields if before else {}), **said})
        except ValidationError as error:
            raise ConfigError(explain(error, ENTRIES[kind])) from None
        management.put_group(kind, name, entry, if_match=before.etag if before else None)
    typer.echo(f"{kind} {name} is set")


def _delete(kind: GroupKind, name: str, config: Path | None) -> None:
    with managing(config) as management:
        management.delete_group(kind, name)
    typer.echo(f"{kind} {name} is deleted")


def audit(
    since: Annotated[str | None, typer.Option("--since", help="A time, or how long ago, such as 7d.")] = None,
    kind: Annotated[
        Literal["key", "tenant", "organisation"] | None, typer.Option("--kind", help="Of what was changed.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of one thing alone.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 100,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who changed which key, tenant or organisation, latest first.

    Examples:

    - `forebay audit --since 7d`
    - `forebay audit --kind key --name alice --json`
    """
    with managing(config) as management:
        entries = management.store.audit(
            since=past("--since", since) if since is not None else None, kind=kind, name=name, limit=limit
        )
    if as_json:
        print_json([entry.as_json() for entry in entries])
        return
    rows = (
        (f"{one.at:%Y-%m-%d %H:%M:%S}", one.actor, f"{one.action} {one.kind}", one.name, _told(one.before, one.after))
        for one in entries
    )
    print_table(("time (UTC)", "who", "did", "name", "what"), rows)


def _told(before: Any, after: Any) -> str:
    """What an entry changed, as `name: before → after`; what was made or removed only by its id."""
    if before is None or after is None:
        return str((after or before).get("id", ""))
    changed = [name for name in after if before.get(name) != after[name]]
    return "; ".join(f"{name}: {json.dumps(before.get(name))} → {json.dumps(after[name])}" for name in changed)
