"""What all commands have in common: how a failure is told, which configuration counts, how a table looks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from gateway.settings import ConfigError, load
from gateway.values import parse_duration, parse_moment, parse_past

if TYPE_CHECKING:
    from gateway.state.management import Management

DEFAULT_FILE = Path("forebay.yaml")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; forebay.yaml of this directory when there is one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")]


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


def group(help_text: str) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(
        cls=ExplainingGroup,
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )


def configuration_file(given: Path | None) -> Path | None:
    """The file that counts, or None."""
    return given or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table that can be cut by its columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_json(tree: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print what `--json` asks for."""
    typer.echo(json.dumps(tree, indent=2))


@contextmanager
def managing(config: Path | None) -> Iterator[Management]:
    """Keys and tenants of the configured gateway: its file, and its database brought up to date."""
    from gateway.state.database import upgrade
    from gateway.state.keys import KeyStore
    from gateway.state.management import Management

    settings = load(configuration_file(config))
    upgrade(settings.state_url)
    with KeyStore(settings.state_url) as store:
        yield Management(store, settings)


def moment(option: str, text: str) -> datetime:
    """A time given as such or as a duration from now. CommandError when it is neither."""
    try:
        return parse_moment(text, datetime.now(UTC))
    except ValueError as error:
        raise CommandError(f"{option} {text}: {error}") from None


def past(option: str, text: str) -> datetime:
    """A time given as such or as how long it is ago. CommandError when it is neither."""
    try:
        return parse_past(text, datetime.now(UTC))
    except ValueError as error:
        raise CommandError(f"{option} {text}: {error}") from None


def duration(option: str, text: str) -> float:
    """Seconds. CommandError when it is no duration."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise CommandError(f"{option} {text}: {error}") from None


def mapping(option: str, text: str) -> dict[str, Any] | None:
    """A mapping written as YAML or JSON; None for `none`. CommandError when it is neither."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    if text.strip() != "none" and not isinstance(tree, dict):
        raise CommandError(f"{option}: should be a mapping such as '{{name: value}}', or none")
    return tree if isinstance(tree, dict) else None
