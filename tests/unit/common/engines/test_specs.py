"""Engines as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from kvatlas_common.engines.specs import (
    DnsName,
    EngineDefaults,
    EngineFile,
    EngineSpec,
    clashes,
    parse_engine,
    parse_source,
    split_list,
)
from kvatlas_common.words import EngineId


def test_compact_text_says_everything() -> None:
    written = (
        "127.0.0.1:8001,events=tcp://127.0.0.1:5557,replay=5558,ranks=2,api-key-env=KEY,label.zone=eu,"
        "speculative-drop-blocks=1,reannounces=true"
    )
    spec = parse_engine(written, environ={"KEY": "sesame"})
    assert spec == EngineSpec(
        address="127.0.0.1:8001",
        url="http://127.0.0.1:8001",
        events="tcp://127.0.0.1:5557",
        replay="tcp://127.0.0.1:5558",
        api_key=SecretStr("sesame"),
        ranks=2,
        labels=(("zone", "eu"),),
        speculative_drop_blocks=1,
        reannounces=True,
    )
    assert spec.ids == (EngineId("127.0.0.1:8001"), EngineId("127.0.0.1:8001", 1))
    assert spec.events_endpoint(1) == "tcp://127.0.0.1:5558"
    assert spec.replay_endpoint(1) == "tcp://127.0.0.1:5559"
    assert "sesame" not in f"{spec} {spec!r}"


@pytest.mark.parametrize("style", ["apiKeyEnv", "api_key_env", "api-key-env"])
def test_a_mapping_says_the_same_in_any_spelling(style: str) -> None:
    written = {
        "address": "127.0.0.1:8001",
        "events": 5557,
        style: "KEY",
        "ranks": "2",
        "labels": {"zone": "eu", "n": 1},
    }
    spec = parse_engine(written, environ={"KEY": "sesame"})
    text = "127.0.0.1:8001,events=5557,api-key-env=KEY,ranks=2,label.zone=eu,label.n=1"
    assert spec == parse_engine(text, environ={"KEY": "sesame"})


@pytest.mark.parametrize(
    ("written", "address", "url"),
    [
        ("10.0.0.5", "10.0.0.5:8000", "http://10.0.0.5:8000"),
        ("Engine-1.default.svc:9000", "engine-1.default.svc:9000", "http://engine-1.default.svc:9000"),
        ("http://engine:9000/", "engine:9000", "http://engine:9000"),
        ("https://engine", "engine:443", "https://engine:443"),
        ("http://engine", "engine:80", "http://engine:80"),
        ("[::1]:9000", "[::1]:9000", "http://[::1]:9000"),
        ("http://[2001:DB8::0:1]", "[2001:db8::1]:80", "http://[2001:db8::1]:80"),
    ],
)
def test_an_address_is_written_in_one_way_only(written: str, address: str, url: str) -> None:
    spec = parse_engine(written)
    assert (spec.address, spec.url) == (address, url)
    assert EngineId.parse(spec.address) == spec.id


def test_defaults_fill_what_an_engine_does_not_say() -> None:
    defaults = EngineDefaults(engine_port=9000, zmq_dial_port=5557, zmq_replay_port=5558, api_key=SecretStr("all"))
    assert parse_engine("[::1]", defaults) == EngineSpec(
        "[::1]:9000", "http://[::1]:9000", "tcp://[::1]:5557", "tcp://[::1]:5558", SecretStr("all")
    )
    own = parse_engine({"url": "http://a:1", "events": "tcp://b:7", "apiKey": "own"}, defaults)
    assert (own.events, own.replay, own.api_key) == ("tcp://b:7", "tcp://a:5558", SecretStr("own"))


def test_a_name_stands_for_engines_that_differ_in_their_host_alone() -> None:
    source = parse_source("dns:vllm.default.svc,events=5557,ranks=2", EngineDefaults(zmq_replay_port=5600))
    assert isinstance(source, DnsName)
    assert source.at("fd00::7") == EngineSpec(
        "[fd00::7]:8000", "http://[fd00::7]:8000", "tcp://[fd00::7]:5557", "tcp://[fd00::7]:5600", ranks=2
    )
    assert parse_source({"dns": "vllm.default.svc:8000", "events": 5557, "ranks": 2, "replay": 5600}) == source


def test_a_file_is_named_with_its_path() -> None:
    assert parse_source("file:/etc/engines, all.yaml") == EngineFile(Path("/etc/engines, all.yaml"))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "not <host:port>"),
        ("a b:1", "not <host:port>"),
        ("a:0", "port 0"),
        ("a:70000", "not <host:port>"),
        ("a:1:2", "not an IPv6 address|not <host:port>"),
        ("ftp://a:1", "http or https"),
        ("http://a:1/v1", "without anything after the port"),
        ("a:1,ranks", "not <name>=<value>"),
        ("a:1,ranks=0", "ranks: "),
        ("a:1,rank=2", "no option rank; did you mean ranks?"),
        ("a:1,ranks=2,ranks=3", "given twice"),
        ("a:1,events=udp://a:5557", "neither a port nor tcp://"),
        ("a:1,events=tcp://*:5557", "write events=5557"),
        ("a:1,events=65535,ranks=2", "leaves no room"),
        ("a:1,events=0", "leaves no room"),
        ("a:1,events=ipc:///tmp/x,ranks=2", "neither a port"),
        ("a:1,api-key-env=NOWHERE", "the environment has no NOWHERE"),
        ("dns:http://a:1", "write dns:<host:port>"),
        ("dns:a:1,events=tcp://a:5557", "is a port"),
        ("file:", "followed by a path"),
        (7, "not as int"),
        ({}, "exactly one of"),
        ({"url": "a:1", "address": "a:1"}, "exactly one of"),
        ({"url": "a:1", "apiKey": "x", "api_key": "x"}, "spelled differently"),
        ({"url": "a:1", "apiKey": "x", "apiKeyEnv": "PATH"}, "give one of them"),
        ({"url": "a:1", "labels": [1]}, "labels: "),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_cure(written: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_source(written)


@pytest.mark.parametrize(
    "written",
    [
        "a:1,api-key=sesame",
        "http://user:sesame@a:1",
        {"url": "a:1", "apiKey": ["sesame"]},
        {"url": "a:1", "apiKey": "sesame", "bad": 1},
    ],
)
def test_no_error_repeats_a_key(written: object) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (what it says is looked at below)
        parse_source(written)
    assert "sesame" not in str(caught.value)


def test_a_list_splits_between_engines_not_inside_them() -> None:
    text = "a:1,events=5557,ranks=2, dns:b:2 ,http://c:3,label.zone=eu,"
    assert split_list(text) == ["a:1,events=5557,ranks=2", "dns:b:2", "http://c:3,label.zone=eu"]


def test_clashes_are_named() -> None:
    specs = [
        parse_engine(text) for text in ("a:1", "a:1", "b:1,events=tcp://h:5557,ranks=2", "c:1,events=tcp://h:5558")
    ]
    assert clashes(specs) == [
        "engine a:1 is listed twice",
        "engines b:1 and c:1 cannot both publish at tcp://h:5558: give each its own",
    ]
    assert clashes(specs[1:3]) == []


@given(st.text() | st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text())))
def test_nothing_but_a_value_error_comes_of_nonsense(written: object) -> None:
    try:
        source = parse_source(written)
    except ValueError:
        return
    if isinstance(source, EngineSpec):
        assert EngineId.parse(source.address) == source.id
