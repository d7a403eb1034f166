"""Settings are read from file, environment and command line, and every mistake is explained without its value."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from gateway.settings import (
    ConfigError,
    KeySettings,
    Listen,
    Settings,
    Upstream,
    diff,
    fingerprint,
    json_schema,
    load,
    section_of,
    to_environment,
)
from gateway.values import parse_duration, parse_size
from tests.support.table import each

EXAMPLE = Path(__file__).parents[1] / "forebay.example.yaml"
SECRET = "fb-0123456789ab-averysecretsecret"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests see no FOREBAY_ variable of the person who runs them, and never their data."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path / "home"))


def problems_of(tree: Mapping[str, object]) -> list[str]:
    """What `load` says about a tree."""
    with pytest.raises(ConfigError) as caught:
        load(None, tree)
    return caught.value.problems


# --- durations and sizes -----------------------------------------------------------------------------------------

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.lists(st.tuples(st.integers(0, 2000), st.sampled_from(sorted(UNITS))), min_size=1, max_size=4))
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(text) == pytest.approx(sum(number * UNITS[unit] for number, unit in parts))


@given(st.floats(0, 1e9))
def test_a_number_of_seconds_is_kept_and_reads_back(seconds: float) -> None:
    assert parse_duration(seconds) == seconds
    assert parse_duration(parse_duration(seconds)) == seconds
    assert parse_duration(f"{seconds:.9f}") == pytest.approx(seconds, abs=1e-9)


@given(st.integers(0, 10**6), st.sampled_from(sorted(SIZES)), st.sampled_from(["", " "]), st.booleans())
def test_a_size_is_number_times_unit_and_reads_back(number: int, unit: str, space: str, lower: bool) -> None:
    text = f"{number}{space}{unit.lower() if lower else unit}"
    assert parse_size(text) == number * SIZES[unit]
    assert parse_size(parse_size(text)) == number * SIZES[unit]


@given(st.text(max_size=20) | st.floats(allow_nan=True) | st.integers() | st.booleans() | st.none() | st.binary())
def test_anything_else_is_refused_and_nothing_negative_or_endless_comes_out(value: object) -> None:
    for parse, most in ((parse_duration, 1e9), (parse_size, 2**60)):
        try:
            result = parse(value)
        except ValueError as error:
            assert "should be a" in str(error)
        else:
            assert 0 <= result <= most
            assert not isinstance(value, bool)


@each("text", ["", "s", "-1s", "1 s", "1s2", "1e3", "inf", "nan", "5 minutes", "٣s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="should be a duration such as"):
        parse_duration(text)


@each("text", ["", "MB", "-1MB", "1.5B", "1iB", "10XB", "1e3", "0x10", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="should be a size such as"):
        parse_size(text)


# --- sources and their order -------------------------------------------------------------------------------------


def test_defaults_serve_on_loopback_and_ask_for_a_key(tmp_path: Path) -> None:
    settings = load(None)
    assert (settings.listen.host, settings.listen.port, settings.auth) == ("127.0.0.1", 8000, "keys")
    assert settings.admin.host == "127.0.0.1"
    assert settings.media.remote == "off"
    assert settings.data_dir == tmp_path / "home"
    assert settings.state_url == f"sqlite:///{tmp_path}/home/forebay.db"


def test_command_line_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_text("listen: {host: 0.0.0.0, port: 1, backlog: 10}\ntimeouts: {connect: 500ms}\n")
    monkeypatch.setenv("FOREBAY_LISTEN__PORT", "2")
    monkeypatch.setenv("FOREBAY_LISTEN__BACKLOG", "20")
    listen = load(file, {"listen": {"backlog": 30}}).listen
    assert (listen.host, listen.port, listen.backlog) == ("0.0.0.0", 2, 30)
    assert load(file).timeouts.connect == 0.5


def test_every_kind_of_value_comes_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LISTEN__TLS__CERTIFICATE": "/tls/cert.pem",
        "LISTEN__TLS__PRIVATE_KEY": "/tls/key.pem",
        "BOUNDS__BODY": "20MB",
        "TIMEOUTS__IDLE": "2m",
        "ADMIN__ENABLED": "false",
        "UPSTREAMS": '[{"url": "http://engine:8000"}]',
        "TRUSTED_PROXIES": '["10.0.0.0/8"]',
        "DATA_DIR": "~/forebay",
    }.items():
        monkeypatch.setenv(f"FOREBAY_{name}", value)
    settings = load(None)
    assert settings.listen.tls is not None
    assert settings.listen.tls.private_key == Path("/tls/key.pem")
    assert (settings.bounds.body, settings.timeouts.idle, settings.admin.enabled) == (20_000_000, 120.0, False)
    assert [upstream.url for upstream in settings.upstreams] == ["http://engine:8000"]
    assert settings.trusted_proxies == (ip_network("10.0.0.0/8"),)
    assert settings.data_dir == Path.home() / "forebay"


def test_overrides_reach_another_process_through_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides: dict[str, object] = {
        "auth": "none",
        "listen": {"host": "0.0.0.0", "port": 9000},
        "shutdown": {"announce": 0},
        "upstreams": [{"url": "http://a", "api_key": SECRET, "models": {"public": "own"}}],
    }
    expected = load(None, overrides)
    for name, value in to_environment(overrides).items():
        monkeypatch.setenv(name, value)
    assert load(None) == expected


def test_building_settings_directly_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_LISTEN__PORT", "2")
    assert Settings().listen.port == 8000


def test_environment_mistakes_are_said_but_foreign_variables_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_PORT", "tcp://10.0.0.1:8000")  # Kubernetes sets it for a service named forebay
    monkeypatch.setenv("FOREBAY_SERVICE_HOST", "10.0.0.1")
    assert load(None).listen.port == 8000
    monkeypatch.setenv("FOREBAY_LISTNE__PORT", "1")
    monkeypatch.setenv("FOREBAY_LISTEN__PROT", "1")
    assert problems_of({}) == [
        "listen.prot: unknown key; did you mean listen.port?",
        "listne: unknown key; did you mean listen?",
    ]
    monkeypatch.setenv("FOREBAY_KEYS", f"[{SECRET}")
    (problem,) = problems_of({})
    assert problem.startswith("FOREBAY_KEYS: should hold JSON")


def test_the_tree_is_frozen() -> None:
    settings = load(None)
    with pytest.raises(ValidationError):
        settings.listen.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.auth = "none"  # type: ignore[misc]


def test_the_example_holds_the_defaults_and_runs_the_packaged_model() -> None:
    example = load(EXAMPLE)
    (engine,) = example.engines
    assert (engine.device, engine.model) == ("cpu", "smollm2-135m-instruct")
    assert diff(example, load(None)).needs_restart == ["engines"]
    assert diff(example, load(None)).live == []


def test_the_example_with_everything_switched_on_is_valid_and_complete() -> None:
    """Each key exists and each one that exists is shown; a `#` without a space is a setting, with one it is prose."""
    lines = EXAMPLE.read_text().splitlines()
    tree = yaml.safe_load("\n".join(re.sub(r"^( *)#(?! |$)", r"\1", line) for line in lines))
    Settings(**tree)
    free_names = re.compile(r"upstreams\.models\.|media\.paths\.|engines\.environment\.|engines\.adapters\.at_start\.")
    shown = {path for path in _paths_of_tree(tree) if not free_names.match(path)}
    # Names that are free to choose, and sets of limits, which are all alike: one is shown at length.
    named = re.compile(r"^(limits\.(?:tenants|organisations|models|pools)|models)\.[^.]+(\.|$)")
    shown = {named.sub(r"\1\2", path) for path in shown}
    declared = set(_paths_of_model(Settings))
    # Of places for a secret outside of lists only one can be switched on; the others are named beside it.
    elsewhere = {path for path in declared if path.endswith(("url_file", "url_env"))}
    assert all(f"{path.rpartition('.')[2]}: " in EXAMPLE.read_text() for path in elsewhere)
    declared -= elsewhere
    alike = {path.rpartition(".")[0] + "." for path in declared if path.endswith(".tokens_in_flight")}
    alike.remove("limits.defaults.key.")
    assert {p for p in shown if not p.startswith((*alike,))} == {p for p in declared if not p.startswith((*alike,))}


def test_the_line_for_a_gpu_in_the_example_works() -> None:
    (line,) = [line for line in EXAMPLE.read_text().splitlines() if "cuda, model" in line]
    engines = yaml.safe_load(line.removeprefix("#"))
    (engine,) = load(None, {"engines": engines}).engines
    assert (engine.device, engine.model) == ("cuda", "Qwen/Qwen3-8B")


def _paths_of_tree(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _paths_of_tree(item, f"{prefix}{name}.")


def _paths_of_model(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _paths_of_model(inner, f"{prefix}{name}.")


# --- the file itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen: [", r"line 1, column \d+: .*expected"),
        ("listen: {port: 1}\nauth: none\nlisten: {}\n", r"line 3, column 1: 'listen' is given twice"),
        ("- a\n", "should be a mapping"),
        ("\x07", "is not YAML"),
        ("1: 2\n", "1: unknown key; keys are words"),
    ],
)
def test_a_broken_file_is_explained_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(file)


def test_no_file_a_directory_and_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; start from forebay\.example\.yaml"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "latin.yaml")


def test_a_bare_off_is_the_word(tmp_path: Path) -> None:
    (tmp_path / "forebay.yaml").write_text("media: {remote: off}\n")
    assert load(tmp_path / "forebay.yaml").media.remote == "off"


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load(tmp_path / "empty.yaml") == load(None)


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_together_with_full_paths() -> None:
    said = problems_of(
        {
            "listen": {"prot": 1, "face": "fast"},
            "auht": "none",
            "timeouts": {"connect": 0, "idle": "soon"},
            "bounds": 5,
            "upstreams": [{"url": "http://a"}, {}],
            "keys": {"name": "a"},
        }
    )
    assert sorted(said) == [
        "auht: unknown key; did you mean auth?",
        "bounds: should be a mapping of keys to values",
        "keys: should be a list",
        "listen.face: should be 'protocol' or 'asgi'",
        "listen.prot: unknown key; did you mean listen.port?",
        "timeouts.connect: should be more than zero",
        "timeouts.idle: should be a duration such as 500ms, 15s, 2m or 1h, or a number of seconds; not negative",
        "upstreams[1].url: is missing",
    ]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"port": 1}, "port: unknown key; did you mean listen.port or admin.port or engines[].port?"),
        ({"keys": [{"name": "a", "key": "k", "cap": {}}]}, "keys[0].cap: unknown key; did you mean keys[0].caps?"),
        (
            {"stream": {"zzz": 1}},
            "stream.zzz: unknown key; known here: heartbeat_after, retries, retry_share, hedge, resume",
        ),
        (
            {"listen": {"tls": {"certifcate": "a", "private_key": "b", "certificate": "c"}}},
            "listen.tls.certifcate: unknown key; did you mean listen.tls.certificate?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(tree: dict[str, object], said: str) -> None:
    assert problems_of(tree) == [said]


SECTIONS = {
    name: [*field.annotation.model_fields]
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


@given(st.data())
def test_a_key_with_two_letters_swapped_is_recognised(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    name = data.draw(st.sampled_from([name for name in SECTIONS[section] if len(name) > 3]))
    at = data.draw(st.integers(0, len(name) - 2))
    typo = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    if typo in SECTIONS[section]:
        return
    (problem,) = problems_of({section: {typo: 1}})
    assert problem.startswith(f"{section}.{typo}: unknown key; did you mean {section}.")


@each(
    ("tree", "said"),
    [
        ({"admin": {"port": 8000}}, "admin.port: is 8000 like listen.port"),
        ({"engines": [{"name": "a", "port": 8000}]}, "engines[0].port: is the gateway's own port 8000"),
        ({"engines": [{"name": "a"}, {"name": "a"}]}, "engines[1].name: is the same as engines[0].name"),
        ({"upstreams": [{"url": "http://a"}, {"url": "http://a/"}]}, "upstreams[1].url: is the same"),
        ({"keys": [{"name": "a", "key": "x"}, {"name": "a", "key": "y"}]}, "keys[1].name: is the same"),
        ({"keys": [{"name": "a", "sha256": "ab" * 32}, {"name": "b", "sha256": "AB" * 32}]}, "keys[1].sha256: is the"),
        (
            {"upstreams": [{"url": "http://a", "minder": "http://a"}]},
            "upstreams[0]: minder should be unix:/path or http:",
        ),
        ({"upstreams": [{"url": "http://a", "minder": "https://a:1"}]}, "upstreams[0]: minder should be unix:/path or"),
        ({"media": {"hosts": ["a"]}}, "media.hosts: has no effect while media.remote is off"),
        ({"stream": {"heartbeat_after": -1}}, "stream.heartbeat_after: should be a duration"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "trusted_proxies[0]: should be an address or a network"),
        ({"trusted_proxies": [10]}, "trusted_proxies[0]: should be an address or a network"),
        (
            {"upstreams": [{"url": "http://a", "engine": "vlm"}]},
            "upstreams[0].engine: is no engine; did you mean vllm?",
        ),
        ({"engines": [{"name": "a", "kind": "zzz"}]}, "engines[0].kind: is no engine; write vllm"),
        ({"engines": [{"name": "a", "profile": "h100-8b"}]}, "engines[0]: profile is what a simulated engine pretends"),
        (
            {"engines": [{"name": "a", "kind": "simulated", "profile": "h200"}]},
            "engines[0]: there is no profile 'h200'; write one of h100-8b, ",
        ),
        ({"listen": {"port": 70000}}, "listen.port: should be less than or equal to 65535"),
        ({"keys": [{"name": "a", "sha256": "abc"}]}, "keys[0].sha256: should be 64 hexadecimal digits; type: printf"),
        ({"keys": [{"name": "a", "key": "k", "models": ["a*b"]}]}, "keys[0].models[0]: should be a model name, or"),
        ({"stream": {"hedge": {"after": "p99"}}}, "stream.hedge.after: should be p95, or a duration above zero"),
        ({"stream": {"hedge": {"after": 0}}}, "stream.hedge.after: should be p95, or a duration above zero"),
        ({"stream": {"hedge": {"share": 0.6}}}, "stream.hedge.share: should be less than or equal to 0.5"),
        ({"models": {"a": {}}}, "models.a: says nothing; write routes, mirror or fallback"),
        ({"models": {"a": {"mirror": {"model": "b"}}}}, "models.a.mirror.share: is missing"),
        (
            {"models": {"a": {"mirror": {"model": "b", "share": 2}}}},
            "models.a.mirror.share: should be less than or equal",
        ),
        ({"models": {"a": {"fallback": ["a"]}}}, "models.a.fallback: falls back on itself"),
        ({"models": {"a": {"fallback": ["b", "b"]}}}, "models.a: fallback: one of them is there twice"),
        ({"models": {"a": {"fallback": list("bcdef")}}}, "models.a.fallback: tuple should have at most 4 items"),
        ({"models": {"a": {"routes": [{"model": "b", "weight": 0}]}}}, "models.a: routes: all weigh 0"),
        ({"models": {"a": {"routes": [{"model": "b", "weight": -1}]}}}, "models.a.routes[0].weight: should be greater"),
        ({"models": {"a": {"routes": [{"model": "b"}, {"model": "b"}]}}}, "models.a: routes: one of them is there"),
        (
            {"models": {"a": {"route": [], "fallback": ["b"]}}},
            "models.a.route: unknown key; did you mean models.a.routes",
        ),
        (
            {"engines": [{"name": "e"}], "models": {"a": {"routes": [{"model": "b", "device": "cuda"}]}}},
            "models.a.routes[0].device: no upstream has device: cuda",
        ),
        (
            {"models": {"a": {"routes": [{"model": "b"}]}, "b": {"routes": [{"model": "c"}]}}},
            "models.a.routes[0].model: 'b' has routes of its own; name a model that engines serve",
        ),
        (
            {
                "upstreams": [{"url": "http://a", "models": {"large": "x"}}],
                "models": {"a": {"routes": [{"model": "large"}], "fallback": ["lagre"]}},
            },
            "models.a.fallback[0]: no upstream serves it; did you mean large?",
        ),
        (
            {
                "upstreams": [{"url": "http://a", "models": {"large": "x"}}],
                "models": {"larg": {"fallback": ["large"]}},
            },
            "models.larg: no upstream serves it; did you mean large?",
        ),
        ({"keys": [{"name": "a\n", "key": "k"}]}, "keys[0].name: should be a name of 1 to 200 printable"),
        ({"upstreams": [{"url": "http://a", "models": {"x" * 201: "y"}}]}, "upstreams[0].models."),
    ],
)
def test_what_does_not_fit_is_refused(tree: dict[str, object], said: str) -> None:
    (problem,) = problems_of(tree)
    assert problem.startswith(said)


def test_port_zero_and_a_unix_socket_never_clash() -> None:
    assert load(None, {"listen": {"port": 0}, "admin": {"port": 0}}).listen.port == 0
    assert load(None, {"listen": {"port": 8001, "unix_socket": "/run/forebay.sock"}}).listen.is_loopback
    assert load(None, {"listen": {"port": 8001}, "admin": {"enabled": False}}).listen.port == 8001


@each(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("a.b", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Listen(host=host).is_loopback is loopback


# --- upstreams ---------------------------------------------------------------------------------------------------


@each(
    ("url", "kept"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/", "http://host:8000"),
        ("https://engine.example", "https://engine.example"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("unix:/run/engine.sock", "unix:/run/engine.sock"),
    ],
)
def test_upstream_urls(url: str, kept: str) -> None:
    assert Upstream(url=url).url == kept


@each(
    ("url", "said"),
    [
        ("http://host:8000/v1", "write http://host:8000, the gateway adds the paths itself"),
        ("http://host?x=1", "write http://host, the gateway"),
        ("http://user:hunter2@host", "holds credentials; take them out"),
        ("host:8000", "has no scheme the gateway speaks; write http://host:port"),
        ("http://host:port", "is not a URL; write"),
        ("unix:engine.sock", "names no absolute path"),
        ("", "has no scheme"),
    ],
)
def test_an_upstream_url_with_more_than_a_place_says_what_to_write(url: str, said: str) -> None:
    (problem,) = problems_of({"upstreams": [{"url": url}]})
    assert problem.startswith("upstreams[0].url: ")
    assert said in problem
    assert "hunter2" not in problem


def test_an_upstream_has_one_credential_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "from-environment")
    (tmp_path / "key").write_text("from-file\n")
    assert Upstream(url="http://a").credential() is None
    assert Upstream.model_validate({"url": "http://a", "api_key": "given"}).credential() == "given"
    assert Upstream(url="http://a", api_key_file=tmp_path / "key").credential() == "from-file"
    assert Upstream(url="http://a", api_key_env="ENGINE_KEY").credential() == "from-environment"
    both = {"url": "http://a", "api_key_env": "A", "api_key_file": "b"}
    assert problems_of({"upstreams": [both]}) == ["upstreams[0]: should have at most one of api_key_file, api_key_env"]
    unset = {"url": "http://a", "api_key_env": "NOT_SET"}
    assert problems_of({"upstreams": [unset]}) == [
        "upstreams[0]: upstream 'http://a': environment variable NOT_SET is empty or not set"
    ]
    plain = {"url": "http://a", "ca_file": "b"}
    assert problems_of({"upstreams": [plain]}) == [
        "upstreams[0]: ca_file is for https:// URLs only; take it out or change the URL"
    ]


# --- keys --------------------------------------------------------------------------------------------------------


def test_a_key_is_known_by_its_hash_wherever_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(SECRET.encode()).digest()
    (tmp_path / "key").write_text(SECRET + "\n")
    monkeypatch.setenv("THE_KEY", SECRET)
    for place in (
        {"sha256": digest.hex().upper()},
        {"key": SECRET},
        {"key_file": tmp_path / "key"},
        {"key_env": "THE_KEY"},
    ):
        assert KeySettings.model_validate({"name": "a", **place}).digest() == digest


@pytest.mark.parametrize("places", [{}, {"key": "a", "key_env": "B"}, {"sha256": "ab" * 32, "key_file": "f"}])
def test_a_key_is_kept_in_exactly_one_place(places: dict[str, str]) -> None:
    (problem,) = problems_of({"keys": [{"name": "a", **places}]})
    assert problem.startswith("keys[0]: should have exactly one of sha256, key, key_file and key_env, but has")


def test_keys_that_cannot_be_read_or_are_the_same_are_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("same")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one two")
    said = problems_of(
        {
            "keys": [
                {"name": "a", "key": "same"},
                {"name": "b", "key_file": tmp_path / "key"},
                {"name": "c", "key_file": tmp_path / "none"},
                {"name": "d", "key_env": "NOT_SET"},
                {"name": "e", "key_file": tmp_path / "empty"},
                {"name": "f", "key_file": tmp_path / "two"},
            ]
        }
    )
    assert [problem.replace(str(tmp_path), "DIR") for problem in said] == [
        "keys[1]: is the same key as keys[0]; each must be its own",
        "keys[2]: key 'c': file DIR/none cannot be read (No such file or directory)",
        "keys[3]: key 'd': environment variable NOT_SET is empty or not set",
        "keys[4]: key 'e': file DIR/empty is empty or not set",
        "keys[5]: key 'f': file DIR/two holds characters that cannot travel in a header (spaces, line ends, non-ASCII)",
    ]


def test_expiry_without_a_zone_is_utc() -> None:
    key = {"name": "a", "key": "k", "expires": "2030-01-01T00:00:00"}
    assert KeySettings.model_validate(key).expires == datetime(2030, 1, 1, tzinfo=UTC)
    moved = {**key, "expires": "2030-01-01T02:00:00+02:00"}
    assert KeySettings.model_validate(moved).expires == datetime(2030, 1, 1, tzinfo=UTC)


def test_no_secret_in_repr_or_in_an_error() -> None:
    tree = {
        "keys": [{"name": "a", "key": SECRET}],
        "upstreams": [{"url": "http://a", "api_key": SECRET}],
        "state": {"url": f"postgresql://u:{SECRET}@h/d"},
        "limits": {"store": {"url": f"redis://u:{SECRET}@h"}},
        "engines": [{"name": "e", "environment": {"HF_TOKEN": SECRET}}],
    }
    settings = load(None, tree)
    assert SECRET not in repr(settings) + str(settings)
    wrong = {
        "keys": [{"name": "a", "key": [SECRET]}, {"name": SECRET + "\n", "key": SECRET, "sha256": SECRET}],
        "upstreams": [{"url": f"http://{SECRET}:x@h", "api_key": {"a": SECRET}}],
        "state": {"url": [SECRET], "key_cache": SECRET},
        "limits": {"store": {"url": f"redis://{SECRET}@h:{SECRET}", "namespace": "{}" + SECRET, "mode": SECRET}},
        "auth": SECRET,
        "listen": SECRET,
    }
    said = problems_of(wrong)
    assert len(said) >= 11
    assert SECRET not in "\n".join(said)
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(wrong)
    assert SECRET not in str(caught.value)


# --- schema, differences, fingerprint ----------------------------------------------------------------------------


def test_the_schema_takes_what_the_loader_takes() -> None:
    schema = json_schema()
    definitions = schema["$defs"]
    connect = definitions["Timeouts"]["properties"]["connect"]
    assert connect["description"] == "For a connection to an engine."
    (pattern,) = [arm["pattern"] for arm in connect["anyOf"] if arm["type"] == "string"]
    for text in ("15s", "500ms", "1h30m", "15"):
        assert re.search(pattern, text)
        parse_duration(text)
    (pattern,) = [arm["pattern"] for arm in definitions["Bounds"]["properties"]["body"]["anyOf"] if "pattern" in arm]
    for text in ("10MB", "256KB", "1MiB", "1024"):
        assert re.search(pattern, text)
        parse_size(text)
    assert schema["additionalProperties"] is False
    sections = [definition for definition in definitions.values() if "properties" in definition]
    assert all(section["additionalProperties"] is False for section in sections)
    assert str(Path.home()) not in json.dumps(schema)


def test_every_key_is_described() -> None:
    schema = json_schema()
    sections = [schema, *(section for section in schema["$defs"].values() if "properties" in section)]
    undescribed = [
        f"{section['title']}.{name}"
        for section in sections
        for name, key in section["properties"].items()
        if not key.get("description") and "$ref" not in key  # a section says what it is itself
    ]
    assert undescribed == []


def test_differences_tell_what_needs_a_restart(tmp_path: Path) -> None:
    old = load(None)
    new = load(
        None,
        {
            "listen": {"port": 9000},
            "admin": {"enabled": False},
            "log": {"file": str(tmp_path / "log"), "level": "debug"},
            "state": {"key_cache": "2h"},
            "data_dir": str(tmp_path),
            "engines": [{"name": "e"}],
            "upstreams": [{"url": "http://a"}],
            "limits": {"store": {"url": "redis://a", "mode": "exact"}, "assumed_output": 5},
            "bounds": {"body": "1MB"},
        },
    )
    changes = diff(old, new)
    assert changes.live == ["upstreams", "limits.assumed_output", "bounds.body", "log.level"]
    assert changes.needs_restart == [
        "listen.port", "admin.enabled", "engines", "limits.store.url", "limits.store.mode", "log.file",
        "state.key_cache", "data_dir",
    ]  # fmt: skip
    assert changes
    assert not diff(old, load(None))


def test_the_fingerprint_sees_secrets_and_shows_none(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("one")
    tree: dict[str, object] = {"keys": [{"name": "a", "key_file": str(file)}]}
    first = fingerprint(load(None, tree))
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert fingerprint(load(None, tree)) == first
    file.write_text("two")
    assert fingerprint(load(None, tree)) != first
    upstream = {"url": "http://a"}
    prints = {
        fingerprint(load(None, {"upstreams": [{**upstream, **more}]}))
        for more in ({}, {"api_key": "a"}, {"api_key": "b"})
    }
    prints |= {fingerprint(load(None, {"limits": {"store": {"url": f"redis://:{word}@h"}}})) for word in "ab"}
    assert len(prints) == 5


# --- where limits are kept ---------------------------------------------------------------------------------------


def test_the_url_of_the_store_of_limits_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(None).limits.store.server() is None
    url = f"redis+sentinel://u:{SECRET}@a,b/main"
    (tmp_path / "url").write_text(url + "\n")
    monkeypatch.setenv("THE_URL", url)
    for place in ({"url": url}, {"url_file": str(tmp_path / "url")}, {"url_env": "THE_URL"}):
        found = load(None, {"limits": {"store": place}}).limits.store.server()
        assert found is not None
        assert (found[0], str(found[1])) == (url, "redis+sentinel://a:26379,b:26379/main")
    monkeypatch.setenv("FOREBAY_LIMITS__STORE__URL", url)
    monkeypatch.setenv("FOREBAY_LIMITS__STORE__WHEN_LOST", "closed")
    store = load(None).limits.store
    assert (store.when_lost, store.server()) == ("closed", found)


@each(
    ("store", "said"),
    [
        ({"url": f"http://u:{SECRET}@h"}, "limits.store.url: not the URL of a Redis server (redis://, rediss://, unix"),
        ({"url": f"redis://h:{SECRET}"}, "limits.store.url: the URL of a Redis server has no valid host and port"),
        ({"url_env": "BAD_URL"}, "limits.store: the URL of a Redis server has something else than a number for its"),
        ({"url_env": "NOT_SET"}, "limits.store: environment variable NOT_SET is empty or not set"),
        ({"url_file": "/nowhere"}, "limits.store: file /nowhere cannot be read (No such file or directory)"),
        ({"url": "redis://h", "url_env": "A"}, "limits.store: should have at most one of url, url_env"),
        ({"replicas": 3}, "limits.store: 3 replicas need a Redis server to share limits: without one each of them"),
        ({"url": "redis://h", "ca_file": "/a"}, "limits.store.ca_file: is for rediss:// URLs only; take it out or"),
        ({"url": "rediss+sentinel://h/main", "ca_file": "/nowhere"}, "limits.store.ca_file: /nowhere cannot be read"),
        ({"url": "rediss://h", "ca_file": "/nowhere"}, "limits.store.ca_file: /nowhere cannot be read (No such file"),
        ({"url": f"rediss://h?ssl_ca_certs={EXAMPLE}"}, f"limits.store.ca_file: {EXAMPLE} cannot be read ("),
        ({"timeout": "1ms"}, "limits.store.timeout: should be at least 5ms and at most 5s"),
        ({"namespace": "{a}"}, "limits.store.namespace: should be 1 to 100 letters, digits or one of _ . : -"),
        ({"when_lost": "store"}, "limits.store.when_lost: should be 'degraded', 'open' or 'closed'"),
        ({"uri": "redis://h"}, "limits.store.uri: unknown key; did you mean limits.store.url?"),
    ],
)
def test_a_store_of_limits_that_cannot_work_is_refused(
    store: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_URL", f"redis://h/{SECRET}")
    (problem,) = problems_of({"limits": {"store": store}})
    assert problem.startswith(said)
    assert SECRET not in problem


def test_what_the_page_on_limits_shows_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://redis")
    shown = re.findall(r"```yaml\n(.*?)```", (EXAMPLE.parent / "docs/limits.md").read_text(), re.DOTALL)
    assert [load(None, yaml.safe_load(text)).limits.store.replicas for text in shown] == [1, 3]


# --- engines of this machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{name: a, quantization: fp8}", "engines[0]: vLLM has no fp8 weights on cpu"),
        ("{name: a, device: cuda, quantization: gguf}", "engines[0].quantization"),
        ("{name: a, tensor_parallel: 2}", "engines[0]: one vLLM on cpu is one process"),
        ("{name: a, memory_share: 1.5}", "engines[0].memory_share"),
    ],
)
def test_an_engine_that_cannot_work_is_refused_with_the_reason(tmp_path: Path, engine: str, said: str) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_text(f"engines:\n  - {engine}\n")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert said in error.value.problems[0]


def test_what_is_asked_of_an_engine(tmp_path: Path) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_text(
        "engines:\n"
        "  - {name: big, device: cuda, model: org/m, devices: ['0', '1'], tensor_parallel: 2, memory_share: 0.8,\n"
        "     quantization: awq, max_running: 8, max_queued: 16, adapters: {rank: 32, at_start: {support: /a/b}}}\n"
    )
    [engine] = load(file).engines
    asked = engine.asked()
    assert (asked.parallel.devices, asked.visible_devices, asked.memory_share) == (2, ("0", "1"), 0.8)
    assert (asked.quantization, asked.max_running, asked.max_queued) == ("awq", 8, 16)
    assert asked.adapters is not None
    assert (asked.adapters.rank, asked.adapters.at_start) == (32, (("support", "/a/b"),))
