"""`forebay engines`: install and run engines; see, drain and restart those behind a gateway that runs."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.registry import ENGINES
from gateway.commands.base import (
    CommandError,
    ConfigOption,
    JsonOption,
    configuration_file,
    group,
    print_json,
    print_table,
)
from gateway.settings import load

engines_app = group("Install and run inference engines; see, drain and restart those behind a gateway that runs.")


class DeviceName(StrEnum):
    """What an engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"
    ASCEND = "ascend"


ModelOption = Annotated[
    str | None, typer.Option("--model", help="The packaged model, a Hugging Face model id or a directory.")
]
DeviceOption = Annotated[DeviceName | None, typer.Option("--device", help="What the engine computes on.")]


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
        environment = ensure_environment(recipe, load(configuration_file(config)).data_dir, display.report)
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
    settings = load(configuration_file(config), {"engines": [engine]})
    raise typer.Exit(run_engine(settings.engines[0], settings))


EngineName = Annotated[str, typer.Argument(help="Its name, as `forebay engines list` shows it.")]


@engines_app.command("list")
def engines_list(
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the engines behind the gateway that runs: how each is, and what it works on.

    Example: `forebay engines list`
    """
    from gateway.operate import operating

    settings = load(configuration_file(config))
    with operating(settings) as operator:
        endpoints = operator.endpoints()
    if as_json:
        print_json(endpoints)
        return
    devices = {engine.name: engine.device for engine in settings.engines}
    titles = ("name", "kind", "device", "models", "state", "pid", "restarts", "in flight", "address")
    print_table(titles, (_endpoint_row(one, devices.get(one["name"], "-")) for one in endpoints))
    for one in endpoints:
        if said := (one["minder"] or {}).get("message") or one["trouble"]:
            typer.echo(f"{one['name']}: {said}", err=True)


def _endpoint_row(one: dict[str, Any], device: str) -> tuple[str, ...]:
    minder = one["minder"] or {}
    return (
        one["name"],
        one["engine"],
        device,
        ", ".join(one["models"]) or "-",
        one["state"],
        str(minder.get("pid") or "-"),
        str(minder.get("restarts", "-")),
        str(one["in_flight"]),
        one["url"],
    )


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

    address = find_minder(load(configuration_file(config)), name)
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

    with operating(load(configuration_file(config))) as operator:
        operator.act(name, "drain")
        wait_drained(operator, name, within, lambda text: typer.echo(text, err=True))
    typer.echo(f"{name} works on nothing and gets nothing new; undo: forebay engines uncordon {name}")


def _act(name: str, action: str, config: Path | None) -> None:
    from gateway.operate import operating

    with operating(load(configuration_file(config))) as operator:
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

    with operating(load(configuration_file(config))) as operator:
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

    address = find_minder(load(configuration_file(config)), name)
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
