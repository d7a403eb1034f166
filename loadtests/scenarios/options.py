"""The arguments that loadtests/locustfile.py adds to locust's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, Protocol

from loadtests.scenarios.schema import names


class Takes(Protocol):
    """A parser of arguments, or a group of them."""

    def add_argument(self, *names: str, **told: Any) -> Any:
        """Add one."""


def add(parser: Takes) -> None:
    """Add them."""
    parser.add_argument(
        "--scenario", metavar="FILE", default="chat", help=f"a scenario's file, or one of {', '.join(names())}"
    )
    parser.add_argument("--seconds", type=float, help="how long requests come, instead of what the scenario says")
    parser.add_argument("--seed", type=int, help="of all that is drawn, instead of the scenario's")
    parser.add_argument("--out", type=Path, help="a folder for the rows and, when the run is over, the report")
    parser.add_argument("--no-report", action="store_true", help="only rows: whoever started this makes the report")
    parser.add_argument(
        "--share",
        type=share_of,
        default=(1, 1),
        help="2/3: the second of three such processes, each with its own --out",
    )


def share_of(text: str) -> tuple[int, int]:
    """Read `2/3`. ArgumentTypeError."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of one of several, such as 2/3")
    return int(found[1]), int(found[2])
