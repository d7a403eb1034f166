"""What a run has shown: figures beside their bounds, and everything that should not have been."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.policy.limits import UNIT
from loadtests.limits.account import (
    Kind,
    Row,
    SlotUse,
    Taken,
    Use,
    balance,
    by_kind,
    charged_of,
    rooms,
    slots_of,
    taken_of,
    use_of,
)
from loadtests.limits.faults import BACK, Fault, Happened
from loadtests.limits.fleet import AT_ONCE, BUDGET, LEAVES, REQUESTS, STAYS, STORE_TIMEOUT, TOKENS, WEIGHED, Plan, Rate
from loadtests.limits.traffic import LONG, Asked, Manner

REQUESTS_BUCKET, TOKENS_BUCKET = "tenant:asks:requests/60", "tenant:writes:tokens/60"
SLOTS_BUCKET = "tenant:holds:concurrent"
PROMPT = 60
"""Tokens that no prompt of the load is longer than."""
LEAST_USED, LEAST_SLOTS = 99.0, 85.0
LEAST_BESIDE_OTHERS = 90.0
BUSY = 0.1
"""Share of the machine that others take beyond which only so much must be used: a process that waits for a processor
leaves what it might have used. No more is let in for it."""
"""Percent. A slot is given back within 50 ms of its request's end and asked for every few; it is held for 1.3 s."""
UNWRITTEN = 0.3
"""Seconds before it is killed of which a replica's rows may be lost: it writes ten times a second."""
SLACK = 2.0
"""Seconds by which an answer may be later than the store's time-out, on a machine that is busy."""


@dataclass(slots=True)
class Seen:
    """All that a run left."""

    plan: Plan
    fault: Fault
    happened: Happened
    began: float
    until: float
    """Unix time at which nobody began to ask any more."""
    asked: Sequence[Asked]
    rows: Sequence[Row]
    killed: Mapping[int, float]
    """Replicas that were killed, and when (Unix time)."""
    engines: Mapping[str, Mapping[str, int]]
    """By model: what its engine counts."""
    slots_left: Mapping[str, int]
    """Slots that living replicas hold when nothing runs any more, by bucket."""
    foreign: float
    """Share of the machine's time that went to others during the load."""
    levels: Mapping[str, int]
    """Of the buckets in the store after all replicas have left, in 1/1000."""


@dataclass(frozen=True, slots=True)
class Line:
    """A limit that was used up."""

    name: str
    reserved: float
    allowed: float
    used: float
    least: float
    detail: str


@dataclass(slots=True)
class Report:
    """Figures, and ``problems``: what contradicts the documentation. None: it holds."""

    limits: list[Line] = field(default_factory=list)
    kinds: list[tuple[str, str, Kind | None, int, int]] = field(default_factory=list)
    """Model, settlement, the ledger's sums, the engine's tokens, and the difference."""
    said: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def demand(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(problem)


def report_of(seen: Seen) -> Report:
    """Hold everything against everything."""
    report = Report()
    _rate(report, seen, "requests", REQUESTS_BUCKET, REQUESTS)
    _rate(report, seen, "tokens", TOKENS_BUCKET, WEIGHED)
    _slots(report, seen)
    _engines(report, seen)
    _rows(report, seen)
    _answers(report, seen)
    _left(report, seen)
    return report


# --- limits ------------------------------------------------------------------------------------------------------


def _rate(report: Report, seen: Seen, name: str, bucket: str, limit: Rate) -> None:
    taken = taken_of(seen.rows, bucket)
    if not taken:
        report.problems.append(f"{name}: nobody was let in")
        return
    use = use_of(taken, limit.burst, limit.rate)
    excess = limit.burst * UNIT if seen.fault.excess else 0
    most = excess + _never_seen(seen, taken)
    returned = _returned(seen, bucket.split(":")[1])
    ready = _standing_ready(returned, bucket, use.window)
    least = _least(seen, use, limit, ready)
    report.demand(
        use.over <= most, f"{name}: {_units(use.over)} reserved beyond burst + rate x window, {_units(most)} allowed"
    )
    report.demand(use.used >= least, f"{name}: {use.used:.2f} % used, at least {least:.2f} % expected")
    # Tokens may be short by what others owe, and shares know no promises.
    again = sum(one.status == 429 and one.ended > due for due, one, _ in returned)
    if bucket == REQUESTS_BUCKET and not seen.happened.away and not seen.fault.empties:
        report.demand(
            again <= len(returned) // 33, f"{again} of {len(returned)} came back in time and were refused again"
        )
    refused = [row.ended for row in seen.rows if row.status == 429 and _is_of(row, bucket)]
    room = sorted(rooms(taken, refused, limit.burst, limit.rate)) if refused else [0]
    detail = (
        f"window {use.window:.2f} s, {_units(ready)} stood ready, beyond the bound {_units(use.over)} (may be"
        f" {_units(most)}), in any window {_units(use.over_any)}, debts {_units(use.debts)}; {len(refused)} refusals,"
        f" {again} of who came back in time, with room for {_units(room[len(room) // 2])} (median),"
        f" {_units(room[-1])} (most)"
    )
    report.limits.append(Line(name, use.reserved / UNIT, use.allowed / UNIT, use.used, least, detail))


def _returned(seen: Seen, tenant: str) -> list[tuple[float, Asked, Row]]:
    """Every return of a refused client: when it was told to come, what it asked then, and the row of that."""
    rows = {row.client_id: row for row in seen.rows}
    asked = {one.id: one for one in seen.asked}
    found = []
    for one in seen.asked:
        if one.tenant == tenant and one.retry_after is not None:
            number, _, attempt = one.id.rpartition("-")
            again = f"{number}-{int(attempt) + 1}"
            if again in asked and again in rows:
                found.append((one.ended + one.retry_after, asked[again], rows[again]))
    return found


def _standing_ready(returned: Sequence[tuple[float, Asked, Row]], bucket: str, window: float) -> int:
    """What stood ready, on the average, for clients between the time they were told and the time they were let in, in
    1/1000: as much of it as there was at the end is not used, and nobody else's."""
    summed = 0.0
    for due, _, row in returned:
        held = sum(part.held for part in row.parts if part.bucket == bucket)
        if row.admitted is not None:
            summed += held * max(0.0, row.admitted - due)
    return int(summed / window)


def _units(amount: float) -> str:
    return f"{amount / UNIT:.3f}".rstrip("0").rstrip(".")


def _is_of(row: Row, bucket: str) -> bool:
    """Whether a refusal was this bucket's; the ledger names it for people: `tenant asks: requests per min (RPM)`."""
    scope, subject, what = bucket.split(":")
    return row.refused_by.startswith(f"{scope} {subject}: {what.partition('/')[0]} per")


def _busiest(taken: Sequence[Taken], seconds: float) -> int:
    """The most that was reserved within so many seconds."""
    most = held = first = 0
    for one in taken:
        held += one.held
        while one.admitted - taken[first].admitted > seconds:
            held -= taken[first].held
            first += 1
        most = max(most, held)
    return most


def _least(seen: Seen, use: Use, limit: Rate, ready: int) -> float:
    """How much must have been used, in percent: 99 on a machine of our own, without what stood ready for clients that
    came late, the time in which the store was away and what it forgot."""
    lost = float(ready)
    if seen.happened.away:
        lost += limit.rate * UNIT * (seen.happened.away + BACK)
    if seen.fault.empties:
        lost += limit.burst * UNIT
    if seen.killed:
        lost += limit.rate * UNIT * (0.5 + UNWRITTEN)
    full = LEAST_USED if seen.foreign <= BUSY else LEAST_BESIDE_OTHERS
    return max(0.0, full * (1 - lost / use.allowed))


def _slots(report: Report, seen: Seen) -> None:
    taken = taken_of(seen.rows, SLOTS_BUCKET)
    use: SlotUse = slots_of(taken, seen.until)
    # Each replica's share is a slot at least; a store that was emptied knows of none until they are said again.
    twice = seen.fault.excess or seen.fault.empties
    most = AT_ONCE + max(AT_ONCE, seen.plan.replicas) if twice else AT_ONCE
    report.demand(use.most <= most, f"requests at once: {use.most}, {most} allowed")
    used = 100 * use.average / AT_ONCE
    least = 0.0 if seen.happened.away or seen.killed or seen.fault.empties or seen.foreign > BUSY else LEAST_SLOTS
    report.demand(used >= least, f"requests at once: {used:.1f} % used, at least {least:.1f} % expected")
    detail = f"window {use.window:.2f} s, on the average {use.average:.2f}"
    report.limits.append(Line("at once", use.most, most, used, least, detail))


# --- the ledger and the engines ----------------------------------------------------------------------------------


def _engines(report: Report, seen: Seen) -> None:
    """The sum of the ledger is the engine's count; what is not known exactly is bounded, request by request."""
    rows = {row.client_id for row in seen.rows}
    # A killed replica's last rows: what was answered is known by the answer, what was cut off is not.
    lost = [asked for asked in seen.asked if asked.id not in rows]
    for model in (STAYS, LEAVES):
        kinds = by_kind(row for row in seen.rows if row.model == model)
        counted = seen.engines[model]["prompt"] + seen.engines[model]["generation"]
        exact = kinds.get("exact", Kind(0, 0, 0))
        mine = [asked for asked in lost if asked.model == model]
        answered = [asked for asked in mine if asked.output is not None]
        known = sum((asked.prompt or 0) + (asked.output or 0) for asked in answered)
        rest = counted - exact.tokens - known
        report.kinds.append((model, "exact", exact, exact.tokens, 0))
        vague = [kind for name, kind in kinds.items() if name not in ("exact", "void")]
        for name, kind in kinds.items():
            if name != "exact":
                report.kinds.append((model, name, kind, -1, 0))
        if mine:
            report.kinds.append((model, "lost", Kind(len(mine), 0, 0), known, known))
        longest = 10 * TOKENS if model == LEAVES else LONG
        unknown = sum(kind.requests for kind in vague) + len(mine) - len(answered)
        ledger = sum(kind.tokens for kind in vague)
        report.kinds.append((model, "not exact", Kind(unknown, ledger, 0), rest, rest - ledger))
        report.demand(
            0 <= rest <= unknown * (PROMPT + longest),
            f"{model}: the engine counted {counted} tokens, {rest} more than the ledger's exact rows and"
            f" {known} of lost rows; {unknown} requests are not known exactly",
        )


def _rows(report: Report, seen: Seen) -> None:
    """Each request has one row, which says what its client was told; those of a killed replica may lack it."""
    rows = {row.client_id: row for row in seen.rows}
    report.demand(len(rows) == len(seen.rows), f"{len(seen.rows) - len(rows)} rows are of requests that have one")
    missing = wrong = 0
    for asked in seen.asked:
        row = rows.pop(asked.id, None)
        if row is None:
            killed = seen.killed.get(asked.replica)
            may_lack = killed is not None and asked.ended > killed - UNWRITTEN
            missing += not (may_lack or asked.error in _NEVER_ARRIVED)
        elif asked.status == 200 and asked.output is not None:
            wrong += (row.prompt, row.output, row.settlement) != (asked.prompt, asked.output, "exact")
    report.demand(not missing, f"{missing} requests are in no ledger")
    report.demand(not wrong, f"{wrong} rows say something else than the client was told")
    report.demand(not rows, f"{len(rows)} rows are of requests nobody sent")


_NEVER_ARRIVED = ("ConnectionRefusedError", "ConnectionResetError")


def _answers(report: Report, seen: Seen) -> None:
    """Nobody hung, nobody was refused wrongly, nothing else failed than what had to."""
    said = Counter(asked.status for asked in seen.asked if asked.status)
    errors = Counter(asked.error for asked in seen.asked if asked.error and asked.replica not in seen.killed)
    report.demand(not errors, f"failed: {dict(errors)}")
    odd = {status: count for status, count in said.items() if status not in (200, 429)}
    wanted = sum(asked.manner is Manner.UNWANTED and asked.status == 502 for asked in seen.asked)
    report.demand(odd in ({502: wanted}, {}), f"other answers: {odd}; {wanted} times 502 were asked for")
    slowest = max((a.ended - a.began for a in seen.asked if a.status == 429), default=0.0)
    report.demand(slowest <= STORE_TIMEOUT + SLACK, f"a refusal took {slowest:.2f} s")
    alone = Counter(asked.standing for asked in seen.asked if asked.standing)
    if seen.happened.away:
        report.demand(bool(alone), "nobody noticed that the store was away")
        latest = max((a.began for a in seen.asked if a.standing), default=0.0)
        back = latest - seen.happened.began - seen.happened.away
        report.demand(back <= BACK, f"the store was found again only after {back:.2f} s")
        report.said.append(f"without the store: {sum(alone.values())} answers, the last {back:+.2f} s after its return")
    elif seen.plan.mode != "memory":
        report.demand(not alone, f"without the store, though it was there: {dict(alone)}")
    light = [a for a in seen.asked if a.tenant == "light" and a.status == 429 and not _just_emptied(seen, a)]
    report.demand(not light, f"{len(light)} refusals of a tenant that asks for less than it may")
    retries = Counter(min(asked.attempt, 9) for asked in seen.asked if asked.status == 200)
    report.said.append(f"others took {seen.foreign:.0%} of the machine")
    report.said.append(f"answers by status {dict(sorted(said.items()))}; the slowest refusal {slowest * 1000:.0f} ms")
    report.said.append(f"let in after so many refusals (9: more): {dict(sorted(retries.items()))}")


def _just_emptied(seen: Seen, asked: Asked) -> bool:
    """A store that comes back empty has nothing at first."""
    back = seen.happened.began + seen.happened.away
    return seen.fault.empties and back - 0.1 <= asked.ended <= back + BACK


# --- what is left ------------------------------------------------------------------------------------------------


def _left(report: Report, seen: Seen) -> None:
    held = {bucket: held for bucket, held in seen.slots_left.items() if held}
    report.demand(not held, f"slots still held: {held}")
    for model, figures in seen.engines.items():
        busy = figures["running"] + figures["waiting"]
        report.demand(not busy, f"the engine of {model} still works on {busy} requests")
    if not seen.plan.budgets or seen.plan.mode == "memory":
        return
    charged = charged_of(seen.rows)
    for bucket, level in sorted(seen.levels.items()):
        if "tokens-budget" in bucket:
            lacks = balance(charged.get(bucket, 0), level, BUDGET * UNIT)
            # A new primary may not have seen what was taken, nor what came back.
            forgotten = _never_seen(seen, taken_of(seen.rows, bucket))
            most = _may_lack(seen, bucket) + forgotten
            report.demand(
                -forgotten <= lacks <= most,
                f"{bucket}: the store lacks {_units(lacks)} beyond the ledger,"
                f" {_units(-forgotten)} to {_units(most)} may be",
            )
            report.said.append(
                f"{bucket}: the store less the ledger {_units(lacks)} (may be {_units(-forgotten)} to {_units(most)})"
            )


def _never_seen(seen: Seen, taken: Sequence[Taken]) -> int:
    """Of writes that a new primary never saw: as much as was reserved in the busiest time of that length."""
    return _busiest(taken, seen.happened.lag + 0.1) if seen.fault.sentinel else 0


def _may_lack(seen: Seen, bucket: str) -> int:
    """What killed replicas take with them: their leases, at most what they used of late, and what was never written."""
    if not seen.killed:
        return 0
    by_id = {asked.id: asked for asked in seen.asked}
    of_killed = [row for row in seen.rows if (a := by_id.get(row.client_id)) is not None and a.replica in seen.killed]
    rows = {row.client_id for row in seen.rows}
    tenant = bucket.split(":")[1]
    lost = [a for a in seen.asked if a.id not in rows and a.tenant == tenant and a.replica in seen.killed]
    return _busiest(taken_of(of_killed, bucket), 0.6) + len(lost) * (2 * PROMPT + LONG) * UNIT


def lines(report: Report) -> Iterator[str]:
    """The report as text."""
    yield f"{'limit':9} {'reserved':>10} {'allowed':>10} {'used':>8} {'at least':>9}"
    for line in report.limits:
        yield (
            f"{line.name:9} {line.reserved:10,.0f} {line.allowed:10,.0f} {line.used:7.2f}% {line.least:8.2f}%"
            f"  {line.detail}"
        )
    yield ""
    yield f"{'model':7} {'settlement':10} {'requests':>8} {'ledger':>9} {'charged':>9} {'engine':>9} {'difference':>10}"
    for model, name, kind, engine, difference in report.kinds:
        count, tokens, charged = (kind.requests, kind.tokens, kind.charged) if kind is not None else (0, 0, 0)
        told = f"{engine:9,} {difference:10,}" if engine >= 0 else ""
        yield f"{model:7} {name:10} {count:8,} {tokens:9,} {charged:9,} {told}"
    yield ""
    yield from report.said
    for problem in report.problems:
        yield f"PROBLEM {problem}"
