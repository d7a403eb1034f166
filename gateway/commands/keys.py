"""`forebay keys`: make, rotate, change, list and revoke API keys, straight in the database."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_type_hints

import typer

from gateway.commands.base import (
    CommandError,
    ConfigOption,
    JsonOption,
    duration,
    group,
    managing,
    mapping,
    moment,
    print_json,
    print_table,
)
from gateway.settings import Caps

keys_app = group("Make, rotate, change, list and revoke API keys. A running gateway sees a change within a second.")

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="Its id as `keys list` shows it, or its name if only one has it.")
]
NameOption = Annotated[str, typer.Option("--name", help="Who uses the key; shown in logs and metrics.")]
ExpiresOption = Annotated[
    str | None, typer.Option("--expires", help="A time such as 2030-01-31 (UTC), in: 30d, 12h; or never.")
]


@dataclass(frozen=True, slots=True)
class Rights:
    """The options that say what a key may do, the same for every command; what is not given is None."""

    tenant: Annotated[
        str | None, typer.Option("--tenant", "--team", help="Who is charged for it; its name when left out.")
    ] = None
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A model it may use, exact or ending in *; repeat. All by default."),
    ] = None
    expires: ExpiresOption = None
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=0, help="Most output tokens of one answer; 0: no cap.")
    ] = None
    context: Annotated[
        int | None, typer.Option("--context", min=0, help="Most tokens of prompt and output; 0: no cap.")
    ] = None
    n: Annotated[int | None, typer.Option("--n", min=0, help="Most answers to one request; 0: no cap.")] = None
    limits: Annotated[
        str | None, typer.Option("--limits", help="What it may use in a time, as YAML or JSON; or none.")
    ] = None
    trust_domain: Annotated[
        str | None, typer.Option("--trust-domain", help="Keys of one domain may share an engine's prefix cache.")
    ] = None

    def changes(self, caps: Caps) -> dict[str, Any]:
        """What was given, over the caps there were; an empty word takes away."""
        given: dict[str, Any] = {}
        if self.tenant is not None:
            given["tenant"] = self.tenant or None
        if self.model is not None:
            given["models"] = self.model
        if self.expires is not None:
            given["expires"] = _end("--expires", self.expires)
        if self.limits is not None:
            given["limits"] = mapping("--limits", self.limits)
        if self.trust_domain is not None:
            given["trust_domain"] = self.trust_domain or None
        asked = {"max_tokens": self.max_tokens, "context": self.context, "n": self.n}
        if set(asked.values()) != {None}:
            said = {name: value or None for name, value in asked.items() if value is not None}
            given["caps"] = Caps.model_validate({**caps.model_dump(), **said})
        return given


def _end(option: str, text: str) -> datetime | None:
    return None if text == "never" else moment(option, text)


def with_rights(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of `Rights`, which it gets as its one argument `rights`."""
    names = [field.name for field in dataclasses.fields(Rights)]
    hints = get_type_hints(Rights, include_extras=True)

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        rights = Rights(**{name: given.pop(name) for name in names})
        command(rights=rights, **given)

    own = inspect.signature(command, eval_str=True).parameters
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name]) for name in names
    ]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own.values() if one.name != "rights"]
    # The configuration stays the last thing a help page tells.
    with_options.__signature__ = inspect.Signature([*parameters[:-1], *options, parameters[-1]])  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in [*parameters, *options]}
    return with_options


@keys_app.command("create")
@with_rights
def keys_create(
    rights: Rights,
    name: NameOption,
    admin: Annotated[bool, typer.Option("--admin", help="It may use the admin API too.")] = False,
    config: ConfigOption = None,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept.

    Examples:

    - `forebay keys create --name alice`
    - `forebay keys create --name batch --tenant research --model 'qwen3-*' --max-tokens 4096 --expires 30d`
    - `export OPENAI_API_KEY=$(forebay keys create --name me)`
    - `forebay keys create --name operator --admin`
    """
    with managing(config) as management:
        created = management.create(name, admin=admin, **rights.changes(Caps()))
    typer.echo(created.key)
    typer.echo(
        f"Keep it: it cannot be shown again. Revoke it: forebay keys revoke {created.record.public_id}", err=True
    )


@keys_app.command("import")
@with_rights
def keys_import(
    rights: Rights,
    name: NameOption,
    sha256: Annotated[str | None, typer.Option("--sha256", help="SHA-256 of the key, in hexadecimal.")] = None,
    key_file: Annotated[
        typer.FileText | None, typer.Option("--key-file", help="File that holds the key; - is standard input.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Let a key that was made elsewhere keep working. It is never taken from the command line, where others see it.

    Examples:

    - `forebay keys import --name bob --key-file bob.key`
    - `forebay keys import --name bob --sha256 2bb80d53…` (what `printf %s 'the-key' | sha256sum` prints)
    """
    if (sha256 is None) == (key_file is None):
        raise CommandError("give the key by exactly one of --sha256 and --key-file")
    key = key_file.read().strip() if key_file else None
    with managing(config) as management:
        stored = management.import_key(name, sha256=sha256, key=key, **rights.changes(Caps()))
    typer.echo(stored.record.public_id)


@keys_app.command("rotate")
def keys_rotate(
    key: KeyArgument,
    overlap: Annotated[str, typer.Option("--overlap", help="How long the old one still works; 0: not at all.")] = "1d",
    expires: Annotated[
        str | None, typer.Option("--expires", help="When the new one ends; as the old one when left out.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Make a key that takes another one's place and print it: the same name, tenant and rights, a new secret.

    The old one works for the overlap, so that nobody is cut off. The new one ends when the old one would have, unless
    `--expires` says otherwise.

    Examples:

    - `forebay keys rotate alice`
    - `forebay keys rotate 0f3a9c51b2de --overlap 1h --expires 90d`
    """
    with managing(config) as management:
        made = management.rotate(key, duration("--overlap", overlap), moment("--expires", expires) if expires else None)
    old = made.replaced
    assert old is not None
    typer.echo(made.key)
    until = old.record.expires_at
    assert until is not None
    works = f"{old.record.public_id} works until {until:%Y-%m-%d %H:%M:%S} UTC"
    typer.echo(f"Keep it: it cannot be shown again. {works}", err=True)


@keys_app.command("show")
def keys_show(key: KeyArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Describe a key: whose it is, what it may do, how long. Never the key itself.

    Example: `forebay keys show alice`
    """
    with managing(config) as management:
        shown = management.key(key).as_json(datetime.now(UTC))
    if as_json:
        print_json(shown)
        return
    for name, value in shown.items():
        if value not in (None, {}):
            typer.echo(f"{name + ':':<14}{', '.join(value) if isinstance(value, list) else value}")


@keys_app.command("update")
@with_rights
def keys_update(rights: Rights, key: KeyArgument, config: ConfigOption = None) -> None:
    """Change what a key may do; what is not given stays. An empty word takes a tenant or a trust domain away.

    Examples:

    - `forebay keys update alice --model 'qwen3-*' --max-tokens 4096`
    - `forebay keys update alice --team research`
    """
    with managing(config) as management:
        before = management.key(key)
        changes = rights.changes(before.record.caps)
        if not changes:
            raise CommandError("nothing to change: say what, for example --tenant or --model")
        after = management.update(key, changes, if_match=before.etag if before.created_at else None)
    changed = after.etag != before.etag
    typer.echo(f"{after.record.public_id} ({after.record.name}) {'is changed' if changed else 'was so already'}")


@keys_app.command("expire")
def keys_expire(
    key: KeyArgument,
    when: Annotated[str, typer.Argument(help="A time such as 2030-01-31 (UTC), in: 30d, 12h; now or never.")],
    config: ConfigOption = None,
) -> None:
    """Say when a key stops working. Unlike a revoked one it can be given more time later.

    Examples:

    - `forebay keys expire alice 30d`
    - `forebay keys expire alice never`
    """
    end = datetime.now(UTC) if when == "now" else _end("WHEN", when)
    with managing(config) as management:
        record = management.update(key, {"expires": end}).record
    typer.echo(f"{record.public_id} ({record.name}) {f'ends {end:%Y-%m-%d %H:%M:%S} UTC' if end else 'never ends'}")


@keys_app.command("revoke")
def keys_revoke(key: KeyArgument, config: ConfigOption = None) -> None:
    """Make a key stop working on every replica within a second, for good.

    Example: `forebay keys revoke 0f3a9c51b2de`
    """
    with managing(config) as management:
        record = management.revoke(key).record
    typer.echo(f"revoked {record.public_id} ({record.name})")


@keys_app.command("list")
def keys_list(
    tenant: Annotated[str | None, typer.Option("--tenant", "--team", help="Those of a tenant alone.")] = None,
    state: Annotated[
        Literal["live", "expired", "revoked"] | None, typer.Option("--state", help="Those in a state alone.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys of the file and of the database, revoked ones too. The keys themselves are never shown.

    Example: `forebay keys list --tenant research --state live`
    """
    with managing(config) as management:
        keys = management.keys(tenant, state)
    rows = [key.as_json(datetime.now(UTC)) for key in keys]
    if as_json:
        print_json(rows)
        return
    print_table(("id", "name", "tenant", "models", "state", "expires", "from"), map(_table_row, rows))


def _table_row(row: dict[str, Any]) -> tuple[str, ...]:
    models = "all" if row["models"] is None else ", ".join(row["models"]) or "none"
    models += " + admin" if row["admin"] else ""
    ends = datetime.fromisoformat(row["expires"]).isoformat(timespec="minutes") if row["expires"] else "never"
    return row["id"] or "-", row["name"], row["tenant"], models, row["state"], ends, row["source"]
