"""What the configuration declares of keys, tenants and organisations: it wins on its names.

Pure: the one place that tells what is the file's, for the API, the commands and the limiter.
"""

from __future__ import annotations

from gateway import limits
from gateway.limits import OrganisationLimits, TenantLimits
from gateway.settings import Settings
from gateway.state.database import NotPossible
from gateway.state.keys import KeySnapshot, StoredKey, record_of_setting
from gateway.state.store import Kind
from gateway.state.tenants import Group, GroupKind


class InFile(NotPossible):
    """The configuration declares it: it is changed there, and nowhere else."""


def declared_tenants(settings: Settings) -> dict[str, Group]:
    """The file's tenants by name."""
    return {name: Group("tenant", name, entry) for name, entry in settings.limits.tenants.items()}


def declared_organisations(settings: Settings) -> dict[str, Group]:
    """The file's organisations by name."""
    return {name: Group("organisation", name, entry) for name, entry in settings.limits.organisations.items()}


def declared_groups(settings: Settings, kind: GroupKind) -> dict[str, Group]:
    """The file's tenants or its organisations by name."""
    return declared_tenants(settings) if kind == "tenant" else declared_organisations(settings)


def known_limits(settings: Settings, snapshot: KeySnapshot) -> limits.Declared:
    """All declarations of limits, the file's and the database's; what the file declares wins on its names."""
    tenants = {name: one.entry for name, one in snapshot.tenants.items() if isinstance(one.entry, TenantLimits)}
    organisations = {
        name: one.entry for name, one in snapshot.organisations.items() if isinstance(one.entry, OrganisationLimits)
    }
    of_file = settings.limits
    stored = {f"tenant:{name}" for name in tenants.keys() - of_file.tenants.keys()}
    stored |= {f"organisation:{name}" for name in organisations.keys() - of_file.organisations.keys()}
    return limits.Declared(
        of_file, {**tenants, **of_file.tenants}, {**organisations, **of_file.organisations}, frozenset(stored)
    )


def declared_keys(settings: Settings) -> list[StoredKey]:
    """The file's keys as they are listed."""
    return [StoredKey(record_of_setting(key, key.name, "file")) for key in settings.keys]


def names(settings: Settings, kind: Kind) -> set[str]:
    """Every name of a kind that the file declares."""
    return {key.name for key in settings.keys} if kind == "key" else {*declared_groups(settings, kind)}


def refuse_declared(settings: Settings, kind: Kind, name: str) -> None:
    """Raise InFile when the file declares that name."""
    if name in names(settings, kind):
        raise InFile(
            f"{kind} {name!r} is declared in the configuration file, which wins: change it there, or take another name"
        )


def users_in_file(settings: Settings, kind: GroupKind, name: str) -> list[str]:
    """What the file declares to belong to a tenant or an organisation, by name."""
    if kind == "tenant":
        return [key.name for key in settings.keys if (key.tenant or key.name) == name]
    return [tenant.name for tenant in declared_tenants(settings).values() if tenant.organisation == name]
