"""The `forebay` command: reads what was typed, calls the room that does it, prints what came out.

Answers go to standard output, so that they can be piped; explanations and mistakes go to standard error. Exit code 0:
done, 1: it could not be done (one line says why and what to do), 2: the command line itself is wrong.
Rooms are imported inside the commands: `forebay --help` should not wait for a database library.
"""

from __future__ import annotations

import contextlib
import json
import platform
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from engines.registry import ENGINES
from gateway.settings import Caps, ConfigError, Settings, json_schema, load, warnings_about
from gateway.values import parse_duration

if TYPE_CHECKING:
    from gateway.state.keys import KeyStore

DEFAULT_FILE = Path("forebay.yaml")


class CommandError(Exception):
    """What was asked cannot be done; the text says why and what to do."""


class ExplainingGroup(TyperGroup):
    """A group of commands that shows expected failures as lines on standard error and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; anything unexpected keeps its traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            lines = _expected(error)
            if lines is None:
                raise
        for line in lines:
            typer.echo(f"forebay: {line}", err=True)
        raise typer.Exit(1)


def _expected(error: Exception) -> list[str] | None:
    """What to say of a failure that rooms explain themselves; None for any other."""
    from engines.conformance import TrialError
    from engines.minding import MinderError
    from engines.steps import EngineSetupError
    from gateway.local import StartError
    from gateway.operate import OperateError
    from gateway.report import ReportError
    from gateway.state.database import StateError

    if isinstance(error, ConfigError):
        return error.problems
    told = (
        CommandError
        | ReportError
        | StartError
        | StateError
        | TrialError
        | EngineSetupError
        | MinderError
        | OperateError
    )
    if isinstance(error, told):
        return [str(error)]
    return None


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(
        cls=ExplainingGroup,
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )


app = _group("An OpenAI-compatible gateway in front of inference engines.\n\nStart with `forebay serve`.")
config_app = _group("Check and describe `forebay.yaml`.")
keys_app = _group("Make, list and revoke API keys. A running gateway sees a change within a second.")
engines_app = _group("Install and run inference engines; see, drain and restart those behind a gateway that runs.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(engines_app, name="engines")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; forebay.yaml of this directory when there is one."),
]


def main() -> None:
    """Run the command; the entry point of the distribution."""
    app(prog_name="forebay")


def _configuration_file(given: Path | None) -> Path | None:
    return given or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)


# --- config ------------------------------------------------------------------------------------------------------


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
    typer.echo(json.dumps(json_schema(), indent=2))


# --- keys --------------------------------------------------------------------------------------------------------

NameOption = Annotated[str, typer.Option("--name", help="Who uses the key; shown in logs and metrics.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="Who is charged for it; the name when left out.")]
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", help="A model it may use, exact or ending in *; repeat. All by default.")
]
ExpiresOption = Annotated[
    str | None, typer.Option("--expires", help="A time such as 2030-01-31 (UTC), or in: 30d, 12h.")
]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most output tokens of one answer.")]
ContextOption = Annotated[int | None, typer.Option("--context", min=1, help="Most tokens of prompt and output.")]
ManyOption = Annotated[int | None, typer.Option("--n", min=1, help="Most answers to one request.")]


def _open_keys(config: Path | None) -> tuple[Settings, KeyStore]:
    """The store of the configured database, brought up to date."""
    from gateway.state.database import upgrade
    from gateway.state.keys import KeyStore

    settings = load(_configuration_file(config))
    upgrade(settings.state_url)
    return settings, KeyStore(settings.state_url)


def _moment(text: str | None) -> datetime | None:
    """`--expires` as a time in UTC; None stays None. CommandError when it is neither a time nor a duration."""
    if text is None:
        return None
    try:
        return datetime.now(UTC) + timedelta(seconds=parse_duration(text))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(
            f"--expires {text}: should be a time such as 2030-01-31 or 2030-01-31T12:00, or a duration such as 30d"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _refuse_declared(settings: Settings, name: str) -> None:
    if any(key.name == name for key in settings.keys):
        raise CommandError(
            f"{name!r} is declared in the configuration, which wins; take another --name or change the file"
        )


@keys_app.command("create")
def keys_create(
    name: NameOption,
    tenant: TenantOption = None,
    model: ModelsOption = None,
    expires: ExpiresOption = None,
    max_tokens: MaxTokensOption = None,
    context: ContextOption = None,
    n: ManyOption = None,
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
    settings, store = _open_keys(config)
    with store:
        _refuse_declared(settings, name)
        caps = Caps(max_tokens=max_tokens, context=context, n=n)
        created = store.create(name, tenant, model, caps, _moment(expires), admin=admin)
    typer.echo(created.key)
    typer.echo(
        f"Keep it: it cannot be shown again. Revoke it: forebay keys revoke {created.record.public_id}", err=True
    )


@keys_app.command("import")
def keys_import(
    name: NameOption,
    sha256: Annotated[str | None, typer.Option("--sha256", help="SHA-256 of the key, in hexadecimal.")] = None,
    key_file: Annotated[
        typer.FileText | None, typer.Option("--key-file", help="File that holds the key; - is standard input.")
    ] = None,
    tenant: TenantOption = None,
    model: ModelsOption = None,
    expires: ExpiresOption = None,
    max_tokens: MaxTokensOption = None,
    context: ContextOption = None,
    n: ManyOption = None,
    config: ConfigOption = None,
) -> None:
    """Let a key that was made elsewhere keep working. It is never taken from the command line, where others see it.

    Examples:

    - `forebay keys import --name bob --key-file bob.key`
    - `forebay keys import --name bob --sha256 2bb80d53…` (what `printf %s 'the-key' | sha256sum` prints)
    """
    if (sha256 is None) == (key_file is None):
        raise CommandError("give the key by exactly one of --sha256 and --key-file")
    settings, store = _open_keys(config)
    with store:
        _refuse_declared(settings, name)
        record = store.import_key(
            name,
            sha256=sha256,
            key=key_file.read().strip() if key_file else None,
            tenant=tenant,
            models=model,
            caps=Caps(max_tokens=max_tokens, context=context, n=n),
            expires=_moment(expires),
        )
    typer.echo(record.public_id)


@keys_app.command("revoke")
def keys_revoke(
    public_id: Annotated[str, typer.Argument(help="Public id as `keys list` shows it, the middle part of fb-…-….")],
    config: ConfigOption = None,
) -> None:
    """Make a key stop working on every replica within a second.

    Example: `forebay keys revoke 0f3a9c51b2de`
    """
    _, store = _open_keys(config)
    with store:
        record = store.revoke(public_id)
    typer.echo(f"revoked {record.public_id} ({record.name})")


@keys_app.command("list")
def keys_list(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """List the keys of the file and of the database, revoked ones too. The keys themselves are never shown."""
    settings, store = _open_keys(config)
    with store:
        rows = [*_declared_rows(settings), *_stored_rows(store)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("id", "name", "tenant", "models", "state", "expires", "from"):
        table.add_column(title, overflow="fold")
    for row in rows:
        models = "all" if row["models"] is None else ", ".join(row["models"]) or "none"
        models += " + admin" if row["admin"] else ""
        table.add_row(
            row["id"] or "-", row["name"], row["tenant"], models, row["state"], row["expires"] or "never", row["source"]
        )
    Console().print(table)


def _declared_rows(settings: Settings) -> list[dict[str, Any]]:
    return [
        _row(None, key.name, key.tenant or key.name, key.models, None, key.expires, "file", key.admin)
        for key in settings.keys
    ]


def _stored_rows(store: KeyStore) -> list[dict[str, Any]]:
    return [
        _row(
            key.record.public_id,
            key.record.name,
            key.record.tenant,
            key.record.models,
            key.revoked_at,
            key.record.expires_at,
            "database",
            key.record.admin,
        )
        for key in store.list()
    ]


def _row(
    public_id: str | None,
    name: str,
    tenant: str,
    models: tuple[str, ...] | None,
    revoked_at: datetime | None,
    expires_at: datetime | None,
    source: str,
    admin: bool,
) -> dict[str, Any]:
    expired = expires_at is not None and expires_at <= datetime.now(UTC)
    return {
        "id": public_id,
        "name": name,
        "tenant": tenant,
        "models": models,
        "state": "revoked" if revoked_at else "expired" if expired else "live",
        "expires": expires_at.isoformat(timespec="minutes") if expires_at else None,
        "source": source,
        "admin": admin,
    }


# --- usage -------------------------------------------------------------------------------------------------------


@app.command()
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
    settings = load(_configuration_file(config))
    upgrade(settings.state_url)
    with contextlib.closing(UsageStore(settings.state_url)) as store:
        if csv is None:
            Console().print(sums_as_table(store, groups, wanted))
        else:
            write_csv(rows_as_csv(store, wanted) if rows else sums_as_csv(store, groups, wanted), csv)


@app.command()
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

    told = find_request(load(_configuration_file(config)), request_id)
    typer.echo(json.dumps(told, indent=2) if as_json else explain_in_text(told))


# --- serve and engines -------------------------------------------------------------------------------------------


class DeviceName(StrEnum):
    """What an engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"
    ASCEND = "ascend"


class Auth(StrEnum):
    """Who is let in."""

    KEYS = "keys"
    NONE = "none"


ModelOption = Annotated[
    str | None, typer.Option("--model", help="The packaged model, a Hugging Face model id or a directory.")
]
DeviceOption = Annotated[DeviceName | None, typer.Option("--device", help="What the engine computes on.")]


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
    plan = make_plan(_configuration_file(config), said, model, device and device.value)
    raise typer.Exit(serve_plan(plan))


@engines_app.command("install")
def engines_install(
    kind: Annotated[
        str, typer.Argument(help=f"Which engine: {' or '.join(kind for kind in ENGINES if kind != 'simulated')}.")
    ],
    device: Annotated[DeviceName, typer.Option("--device", help="What it will compute on.")] = DeviceName.CPU,
    config: ConfigOption = None,
) -> None:
    """Install an engine into an environment of its own. Does nothing when it is there already.

    Example: `forebay engines install vllm --device cuda`
    """
    from engines.devices import Device
    from engines.environments import ensure_environment, recipe_for
    from engines.simulated import DEFAULT_PROFILE, own_environment
    from gateway.greeting import Display

    if kind == "simulated":
        ready = f"forebay engines run simulated --profile {DEFAULT_PROFILE}"
        typer.echo(f"forebay: a simulated engine needs nothing installed; run it: {ready}", err=True)
        typer.echo(own_environment().directory)
        return
    recipe = recipe_for(kind, Device(device.value))
    with Display() as display:
        environment = ensure_environment(recipe, load(_configuration_file(config)).data_dir, display.report)
        display.done()
    typer.echo(environment.directory)


@engines_app.command("run")
def engines_run(
    kind: Annotated[str, typer.Argument(help=f"Which engine: {' or '.join(ENGINES)}.")],
    model: ModelOption = None,
    device: DeviceOption = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="What a simulated engine pretends to be; h100-8b by default.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Loopback port.")] = 8100,
    args: Annotated[list[str] | None, typer.Argument(help="More arguments for the engine, after `--`.")] = None,
    config: ConfigOption = None,
) -> None:
    """Run an engine alone, on a loopback port without a key, until Ctrl-C.

    A simulated engine has no model: it answers made-up words at the pace of a device. Arguments after `--` are its own.

    Examples:

    - `forebay engines run vllm --model Qwen/Qwen3-8B --device cuda`
    - `forebay engines run simulated --profile h100-8b --port 8100 -- --speed 10 --faults`
    """
    from gateway.local import run_engine

    chosen: dict[str, object] = {"name": kind, "kind": kind, "model": model, "device": device and device.value}
    chosen |= {"port": port, "profile": profile, "args": args or None}
    engine = {name: value for name, value in chosen.items() if value is not None}
    settings = load(_configuration_file(config), {"engines": [engine]})
    raise typer.Exit(run_engine(settings.engines[0], settings))


EngineName = Annotated[str, typer.Argument(help="Its name, as `forebay engines list` shows it.")]


@engines_app.command("list")
def engines_list(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """List the engines behind the gateway that runs: how each is, and what it works on.

    Example: `forebay engines list`
    """
    from gateway.operate import operating

    settings = load(_configuration_file(config))
    with operating(settings) as operator:
        endpoints = operator.endpoints()
    if as_json:
        typer.echo(json.dumps(endpoints, indent=2))
        return
    devices = {engine.name: engine.device for engine in settings.engines}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "kind", "device", "models", "state", "pid", "restarts", "in flight", "address"):
        table.add_column(title, overflow="fold")
    for one in endpoints:
        minder = one["minder"] or {}
        table.add_row(
            one["name"],
            one["engine"],
            devices.get(one["name"], "-"),
            ", ".join(one["models"]) or "-",
            one["state"],
            str(minder.get("pid") or "-"),
            str(minder.get("restarts", "-")),
            str(one["in_flight"]),
            one["url"],
        )
    Console().print(table)
    for one in endpoints:
        if said := (one["minder"] or {}).get("message") or one["trouble"]:
            typer.echo(f"{one['name']}: {said}", err=True)


@engines_app.command("logs")
def engines_logs(
    name: EngineName,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines to show.")] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show further lines as they come, until Ctrl-C.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Show what an engine writes. It needs a minder.

    Example: `forebay engines logs local -n 20 -f`
    """
    import asyncio

    from gateway.operate import find_minder, show_logs

    address = find_minder(load(_configuration_file(config)), name)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(show_logs(address, lines, follow, typer.echo))


@engines_app.command("drain")
def engines_drain(
    name: EngineName,
    within: Annotated[float, typer.Option("--within", min=0, help="Seconds to wait for requests under way.")] = 600.0,
    config: ConfigOption = None,
) -> None:
    """Send an engine nothing new and wait until it works on nothing. `uncordon` lets it have requests again.

    Example: `forebay engines drain local`
    """
    from gateway.operate import operating, wait_drained

    with operating(load(_configuration_file(config))) as operator:
        operator.act(name, "drain")
        wait_drained(operator, name, within, lambda text: typer.echo(text, err=True))
    typer.echo(f"{name} works on nothing and gets nothing new; undo: forebay engines uncordon {name}")


def _act(name: str, action: str, config: Path | None) -> None:
    from gateway.operate import operating

    with operating(load(_configuration_file(config))) as operator:
        state = operator.act(name, action)["state"]
    typer.echo(f"{name} is {state}")


@engines_app.command("cordon")
def engines_cordon(name: EngineName, config: ConfigOption = None) -> None:
    """Send an engine nothing new; what it works on goes on. For any engine, with a minder or without.

    Example: `forebay engines cordon local`
    """
    _act(name, "cordon", config)


@engines_app.command("uncordon")
def engines_uncordon(name: EngineName, config: ConfigOption = None) -> None:
    """Let an engine have requests again after `cordon`, `drain` or `eject`.

    Example: `forebay engines uncordon local`
    """
    _act(name, "uncordon", config)


@engines_app.command("eject")
def engines_eject(name: EngineName, config: ConfigOption = None) -> None:
    """Send an engine nothing new and cut off what it works on, for one that hangs: others take over what they can.

    Example: `forebay engines eject local`
    """
    _act(name, "eject", config)


@engines_app.command("restart")
def engines_restart(
    name: EngineName,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds for requests under way to finish.")] = 60.0,
    config: ConfigOption = None,
) -> None:
    """Restart an engine in order: drain, stop, start, and traffic again once it is ready. It needs a minder.

    Engines that `forebay serve` starts have one; another has one where `upstreams[].minder` says so.

    Example: `forebay engines restart local`
    """
    from gateway.operate import operating, wait_restarted

    with operating(load(_configuration_file(config))) as operator:
        starts = (operator.endpoint(name)["minder"] or {}).get("starts", 0)
        operator.act(name, "restart", drain=drain)
        wait_restarted(operator, name, starts, lambda text: typer.echo(text, err=True))
    typer.echo(f"{name} serves again")


@engines_app.command("stop")
def engines_stop(
    name: EngineName,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds for requests under way to finish.")] = 60.0,
    grace: Annotated[float, typer.Option("--grace", min=0, help="Seconds from SIGTERM to SIGKILL.")] = 10.0,
    config: ConfigOption = None,
) -> None:
    """Stop an engine for good, also one that was kept when its gateway ended. It needs a minder.

    Example: `forebay engines stop local`
    """
    import asyncio

    from gateway.operate import find_minder, stop_engine

    address = find_minder(load(_configuration_file(config)), name)
    typer.echo(asyncio.run(stop_engine(address, drain, grace)))


@engines_app.command("check")
def engines_check(
    url: Annotated[str, typer.Argument(help="Where the engine answers: http://host:port or unix:/path.")],
    kind: Annotated[str, typer.Option("--engine", help="What kind of engine it is.")] = "vllm",
    model: Annotated[str | None, typer.Option("--model", help="Which of its models, if there are several.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter it serves, to be checked too.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Its context, where it does not tell.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="One check by name; may be repeated.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds the engine's own key.")] = None,
) -> None:
    """Run the project's conformance checks against an engine of yours. Exits with 1 when one fails.

    It sends some fifty small requests and holds nothing back: do not point it at an engine that serves others.

    Example: `forebay engines check http://gpu-1:8000 --engine sglang --adapter support`
    """
    import asyncio

    from engines.conformance import Result
    from gateway.trial import check_engine

    def tell(result: Result) -> None:
        detail = f": {result.detail}" if result.detail else f"  ({result.seconds:.1f} s)"
        typer.echo(f"{result.verdict:<11} {result.check.name:<20} {result.check.told}{detail}")

    given = {"url": url, "engine": kind} | ({"api_key_env": api_key_env} if api_key_env else {})
    upstream = load(None, {"upstreams": [given]}).upstreams[0]
    good = asyncio.run(check_engine(upstream, model, adapter, max_model_len, only or (), tell))
    raise typer.Exit(0 if good else 1)


@engines_app.command("table")
def engines_table(
    write: Annotated[
        Path | None, typer.Option("--write", help="Put it between the marks of this Markdown file instead.")
    ] = None,
) -> None:
    """Print what each engine can do on each device, and how far that was shown, as Markdown.

    Example: `forebay engines table --write docs/engines.md`
    """
    from engines.table import render, with_tables

    if write is None:
        typer.echo(render())
        return
    try:
        page = with_tables(write.read_text(encoding="utf-8"))
        write.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{write}: {error.strerror}; name a file that is there and can be written") from None
    except ValueError as error:
        raise CommandError(f"{write}: {error}") from None


@app.command()
def doctor(config: ConfigOption = None) -> None:
    """Say what is installed, what is missing and what to type. Changes nothing; exits with 1 when something is wrong.

    Example: `forebay doctor`
    """
    from gateway.doctor import State, examine

    wrong = False
    for finding in examine(_configuration_file(config)):
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
