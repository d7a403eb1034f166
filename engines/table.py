"""The tables of ``docs/engines.md``: what each engine can do on each device, and how far that was shown.

Nothing is decided here: an engine's file says what it can do (``capabilities``, ``paths``, ``obstacles``), a recipe how
it is installed, ``engines.shown`` how far each of that was shown. Pure but for reading the recipes' lock files.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.devices import Device, Quantization
from engines.environments import RECIPES, Recipe
from engines.launch import AdapterSlots, LaunchSpec, Parallel
from engines.minder import Address
from engines.protocol import Capability
from engines.registry import ENGINES, KnownEngine
from engines.shown import EVIDENCE, Evidence, Shown, Start, Subject

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
"""Between these marks a page holds what is written here."""
CANNOT = "-"
_WIDTH = 120
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "lmdeploy": "LMDeploy"}
_WITH_ADAPTERS = {"adapters": AdapterSlots(at_start=(("name", "/adapters/name"),))}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. ``asks`` are the fields of a ``LaunchSpec`` that ask an engine for it at its start."""

    subject: Subject
    label: str
    asks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Topic:
    """One table, and what is said above it."""

    title: str
    told: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """One engine on one device."""

    kind: str
    device: Device

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{TITLES.get(self.kind, self.kind)} {self.device}"

    @property
    def engine(self) -> KnownEngine:
        """What is known of the engine."""
        return ENGINES[self.kind]

    @property
    def evidence(self) -> Evidence:
        """How far that was shown."""
        return EVIDENCE.get(self.kind, Evidence())

    @property
    def recipe(self) -> Recipe | None:
        """How it is installed; None where nothing is."""
        return RECIPES.get((self.kind, self.device))


@dataclass(frozen=True, slots=True)
class Cell:
    """What one column says in one row, and the notes to it. A cell that says ``CANNOT`` has a note that tells why."""

    text: str
    notes: tuple[str, ...] = ()


def columns() -> tuple[Column, ...]:
    """Return every engine on every device it is known for; one that nothing is installed for runs on the CPU."""
    return tuple(
        Column(kind, device)
        for kind in ENGINES
        for device in Device
        if (kind, device) in RECIPES or (device is Device.CPU and not any(kind == known for known, _ in RECIPES))
    )


# --- one cell ----------------------------------------------------------------------------------------------------


def cell(column: Column, row: Row) -> Cell:
    """Return what a column says in a row: a dash where something is in the way, else how far it was shown."""
    reason = next(_reasons(column, row), None)
    remark = column.evidence.remarks.get((row.subject, column.device))
    notes = [] if remark is None else [remark]
    if reason is not None:
        return Cell(CANNOT, (reason, *notes))
    if row.subject is Start.INSTALLED and column.recipe is not None:
        return Cell(column.recipe.shown, tuple(notes))
    shown = column.evidence.of(row.subject, column.device)
    if shown is Shown.PARSER and (other := _other_parser(column)):
        notes.append(other)
    return Cell(shown, (*_limits(column, row), *notes))


def _reasons(column: Column, row: Row) -> Iterator[str]:
    """Tell what keeps an engine from it: what was asked of it is refused, or it declares that it cannot."""
    subject, recipe, engine = row.subject, column.recipe, column.engine
    if subject is Start.INSTALLED and recipe is not None and recipe.elsewhere is not None:
        yield recipe.elsewhere
    if subject is Start.CHOSEN_DEVICES and column.device.visible_variable is None:
        yield f"on {column.device} there is nothing to choose from"
    for obstacle in engine.obstacles(_spec(column, row.asks)):
        # The same for each kind of weights, so that a column has one note of it.
        yield re.sub(r" no [\w-]+ weights on ", " no such weights on ", obstacle)
    if subject in column.evidence.unable:
        yield column.evidence.unable[subject]
    if not _declared(engine, subject):
        yield f"{TITLES.get(column.kind, column.kind)} does not declare it"


def _declared(engine: KnownEngine, subject: Subject) -> bool:
    if isinstance(subject, Capability):
        return subject in engine.capabilities
    # Kinds of weights are strings too.
    return isinstance(subject, Quantization) or not isinstance(subject, str) or subject in engine.paths


def _spec(column: Column, asks: Mapping[str, Any]) -> LaunchSpec:
    plain = LaunchSpec("one", column.kind, column.device, "/model", "model", Address(port=8100))
    return replace(plain, **asks)


def _limits(column: Column, row: Row) -> Iterator[str]:
    """Tell what an engine does not do on a path that it serves."""
    if row.subject in column.engine.base_only_paths:
        yield "the base model only: a request for an adapter is not sent there"
    if row.subject in column.engine.unsalted_paths:
        yield "without a salt: a request of a key with a trust domain is not sent there"


def _other_parser(column: Column) -> str | None:
    """Tell where the parser that was asked is not the one of what is installed: parsers are those of the CPU's."""
    asked, installed = version(Column(column.kind, Device.CPU)), version(column)
    if installed is None or asked is None or installed.partition("+")[0] == asked.partition("+")[0]:
        return None
    title = TITLES.get(column.kind, column.kind)
    return (
        f"taken by the parser of {title} {asked}; that of {installed}, which Forebay installs on {column.device}, was"
        " not asked"
    )


def version(column: Column) -> str | None:
    """Return which version of the engine a recipe installs; None where nothing is."""
    recipe = column.recipe
    if recipe is None:
        return None
    pinned = recipe.lock.read_text().splitlines() if recipe.lock is not None else [*sum(recipe.attempts, ())]
    for line in pinned:
        if found := re.match(rf"{column.kind}(?:-cpu)?==([\w.]+)", line):
            return found[1]
    return None


# --- the rows ----------------------------------------------------------------------------------------------------


def _paths() -> tuple[Row, ...]:
    paths = dict.fromkeys(path for engine in ENGINES.values() for path in engine.paths)
    return tuple(Row(path, f"`{path}`") for path in paths)


TOPICS = (
    Topic(
        "Installed and started",
        "What Forebay does with an engine on this machine (`engines:` in the configuration, `forebay engines install"
        " | run`). An engine that runs already needs none of it: `upstreams:` or `--upstream`.",
        (
            Row(Start.INSTALLED, "installed by `forebay engines install`"),
            Row(Start.STARTED, "started with the command line that Forebay makes"),
            Row(Start.CHOSEN_DEVICES, "on chosen devices (`devices`)", {"visible_devices": ("0",)}),
            Row(Start.MEMORY_SHARE, "a share of a device's memory (`memory_share`)", {"memory_share": 0.5}),
            Row(Start.CONTEXT, "a context of chosen length (`max_model_len`)", {"max_model_len": 4096}),
            Row(Start.LONG_CONTEXT, "a long one, 32,768 tokens and more", {"max_model_len": 131072}),
            Row(
                Capability.UNIX_SOCKET,
                "on a Unix socket that only this user can reach",
                {"address": Address(unix=Path("/run/engine.sock"))},
            ),
        ),
    ),
    Topic(
        "Paths",
        "Whole and, where the path streams, as a stream.",
        _paths(),
    ),
    Topic(
        "Answers",
        "What a chat may ask for beyond text.",
        (
            Row(Capability.TOOLS, "tools"),
            Row(Capability.FORCED_TOOLS, "a named tool is called"),
            Row(Capability.JSON_SCHEMA, "JSON of a schema"),
            Row(Capability.LOGPROBS, "`logprobs`"),
            Row(Capability.STOP_WORDS, "any text stops it (`stop`)"),
            Row(Capability.SEVERAL_ANSWERS, "several answers (`n`)"),
            Row(Capability.CONTINUE, "an answer that has begun goes on"),
            Row(Capability.TOKEN_CHUNKS, "a chunk of a stream is a token"),
        ),
    ),
    Topic(
        "Adapters, queues and checks",
        "What the engine holds to by itself. The gateway makes up for some of it: a model that nobody serves is a 404"
        " whatever engine is behind.",
        (
            Row(Capability.ADAPTERS, "LoRA adapters named at its start", _WITH_ADAPTERS),
            Row(Capability.ADAPTER_LOADING, "LoRA adapters loaded and unloaded while it runs", _WITH_ADAPTERS),
            Row(Capability.CACHE_SALT, "prefix caches of trust domains kept apart"),
            Row(Capability.PRIORITY, "some requests before others"),
            Row(Capability.BOUNDED_QUEUE, "a bounded queue (`max_queued`)", {"max_queued": 8, "max_running": 8}),
            Row(Capability.MODELS_CHECKED, "an unknown model is refused"),
            Row(Capability.LENGTH_CHECKED, "more output than fits is refused"),
        ),
    ),
    Topic(
        "Weights",
        "How the weights may be stored: what the model's files say, or `quantization`.",
        (
            Row(Start.FULL_WEIGHTS, "full weights"),
            *(Row(one, f"`{one}`", {"quantization": one}) for one in Quantization),
        ),
    ),
    Topic(
        "Several devices",
        "One engine over several devices.",
        (
            Row(Start.TENSOR, "within a layer (`tensor_parallel`)", {"parallel": Parallel(tensor=2)}),
            Row(Start.PIPELINE, "by layers (`pipeline_parallel`)", {"parallel": Parallel(pipeline=2)}),
            Row(Start.DATA, "by copies (`data_parallel`)", {"parallel": Parallel(data=2)}),
        ),
    ),
)


# --- the page ----------------------------------------------------------------------------------------------------


def render() -> str:
    """Return all tables as Markdown."""
    shown = columns()
    return "\n\n".join([_versions(shown), *(_topic(topic, shown) for topic in TOPICS), _runs()])


def with_tables(page: str) -> str:
    """Return a page with the tables as they are now between its marks. ValueError when it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there are no marks {BEGIN} and {END} to write between")
    return f"{head}{BEGIN}\n\n{render()}\n\n{END}{tail}"


def _topic(topic: Topic, shown: Iterable[Column]) -> str:
    numbers: dict[str, int] = {}

    def text(found: Cell) -> str:
        marks = [str(numbers.setdefault(note, len(numbers) + 1)) for note in found.notes]
        return f"{found.text} [{', '.join(marks)}]" if marks else found.text

    lines = [[row.label, *(text(cell(column, row)) for column in shown)] for row in topic.rows]
    told = textwrap.fill(topic.told, _WIDTH, break_on_hyphens=False)
    parts = [f"## {topic.title}", told, _table(["", *(column.title for column in shown)], lines)]
    if numbers:
        parts.append("\n".join(f"{number}. {note}" for note, number in numbers.items()))
    return "\n\n".join(parts)


def _versions(shown: Iterable[Column]) -> str:
    """Which version is installed where, and by which packages."""
    lines = []
    for column in shown:
        if (recipe := column.recipe) is None:
            continue
        packages = ", ".join(f"`{word}`" for word in _packages(recipe)) or CANNOT
        lines.append([column.title, version(column) or CANNOT, packages, recipe.elsewhere or ""])
    return "## Versions\n\n" + _table(["", "version", "installed from", ""], lines)


def _packages(recipe: Recipe) -> list[str]:
    if recipe.lock is not None:
        return [f"engines/locks/{recipe.lock.name}"]
    words = [word for attempt in recipe.attempts[:1] for word in attempt]
    return [word for word in words if not word.startswith("--") and word != "auto"]


def _runs() -> str:
    """Where each ``run`` was run."""
    lines = []
    for kind, evidence in EVIDENCE.items():
        files = sorted({f"`tests/{test.partition('::')[0]}`" for test in evidence.run.values()})
        listed = f"- {TITLES.get(kind, kind)}: {', '.join(files)}"
        lines.append(textwrap.fill(listed, _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n\n".join(["## Where each `run` is run", "`engines/shown.py` names the very test.", "\n".join(lines)])


def _table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[index]) for line in (head, *lines)) for index in range(len(head))]
    ruled = [head, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )
