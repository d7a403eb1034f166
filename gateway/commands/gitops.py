"""`forebay diff` and `forebay apply`: a file of keys, tenants and organisations that live in the database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from gateway.commands.base import CommandError, ConfigOption, managing

if TYPE_CHECKING:
    from gateway.state.plan import Change

WantedFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML with keys, tenants and organisations.")]
PruneOption = Annotated[bool, typer.Option("--prune", help="Remove what the file does not name, of the parts it has.")]
DIFFERENT = 2
"""Exit code of `forebay diff` when there are differences."""


class DiffCommand(TyperCommand):
    """Leaves exit code 2 to differences: a wrong command line is 1, like everything else that goes wrong."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        """Take the command line apart."""
        try:
            return super().make_context(*args, **more)
        except Exception as error:
            if hasattr(error, "exit_code"):
                error.exit_code = error.exit_code and 1
            raise


def diff(file: WantedFile, prune: PruneOption = False, config: ConfigOption = None) -> None:
    """Show what `forebay apply` would change. Exit code 0: nothing, 2: something, 1: it cannot be told.

    Example: `forebay diff keys.yaml --prune`
    """
    from gateway.state.apply import differences, read_wanted

    wanted = read_wanted(file)
    with managing(config) as management:
        changes = differences(management.store, wanted, management.own_names, prune)
    _print(changes)
    raise typer.Exit(DIFFERENT if changes else 0)


def apply(
    file: WantedFile,
    prune: PruneOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigOption = None,
) -> None:
    """Bring keys, tenants and organisations of the database to what a file says: all of it, or nothing.

    Keys are known by their SHA-256, so the file holds no secret and can be kept in a repository. Doing it twice changes
    nothing. With `--prune` keys that the file does not name are revoked, tenants and organisations deleted.

    Examples:

    - `forebay apply keys.yaml`
    - `forebay apply keys.yaml --prune --yes`
    """
    from gateway.state.apply import apply as do
    from gateway.state.apply import differences, read_wanted

    wanted = read_wanted(file)
    with managing(config) as management:
        own = management.own_names
        changes = differences(management.store, wanted, own, prune)
        _print(changes)
        if not changes:
            return
        if not yes and not typer.confirm("Do it?", err=True):
            raise CommandError("nothing was changed")
        do(management.store, wanted, own, prune, shown=changes)
    typer.echo(f"done: {len(changes)} changed", err=True)


def _print(changes: Sequence[Change]) -> None:
    for change in changes:
        for line in change.lines():
            typer.echo(line)
    if not changes:
        typer.echo("no difference", err=True)
