"""The router's settings.

Hash settings are accepted so that one file can serve both services; which profiles engines have, the indexer tells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, SecretStr, model_validator

from kvatlas_common.settings import EngineSettings, HashSettings, LogSettings
from kvatlas_common.settings_flags import Spelled
from kvatlas_router.core.plans import Labels, Plan, Plans
from kvatlas_router.core.policies import PolicyName

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


def _host_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} is not <host:port>")
    return text


def _name_path(text: str) -> str:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{text!r} is not <model name>=<path or hub name>")
    return text


@dataclass(frozen=True, slots=True)
class ModelRule:
    """How one model is routed; what it does not say is as for all."""

    model: str
    policy: PolicyName | None = None
    fallback: tuple[PolicyName, ...] | None = None
    temperature_ms: float | None = None
    labels: Labels = ()

    def plan(self, settings: RouterSettings) -> Plan:
        own = self.policy is not None
        return Plan.of(
            self.policy or settings.policy,
            self.fallback if own or self.fallback is not None else settings.fallback,
            temperature_ms=settings.temperature_ms if self.temperature_ms is None else self.temperature_ms,
            labels=self.labels,
        )


def parse_model_rule(written: object) -> ModelRule:
    """`qwen,policy=session,fallback=least-load+random,label.task=chat`. Raises `ValueError` that says what is wrong."""
    if isinstance(written, ModelRule):
        return written
    if not isinstance(written, str) or not written:
        raise ValueError("write <model>,policy=<policy>,...")
    model, *options = written.split(",")
    rule = ModelRule(model)
    for option in options:
        name, equals, value = option.partition("=")
        if not (equals and value):
            raise ValueError(f"{option!r} is not <name>=<value>")
        if name == "policy":
            rule = replace(rule, policy=_policy(value))
        elif name == "fallback":
            rule = replace(rule, fallback=tuple(map(_policy, value.split("+"))))
        elif name == "temperature-ms":
            rule = replace(rule, temperature_ms=_milliseconds(value))
        elif name.startswith("label."):
            rule = replace(rule, labels=(*rule.labels, (name.removeprefix("label."), value)))
        else:
            raise ValueError(f"{name!r} is none of policy, fallback, temperature-ms, label.<name>")
    return rule


def _policy(name: str) -> PolicyName:
    try:
        return PolicyName(name)
    except ValueError:
        raise ValueError(f"policy {name!r} is none of {', '.join(PolicyName)}") from None


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60_000:
        raise ValueError(f"temperature-ms {text!r} is not a number from 0 to 60000")
    return value


ModelPolicy = Annotated[ModelRule, PlainValidator(parse_model_rule), PlainSerializer(str)]


class RouterSettings(HashSettings, EngineSettings, LogSettings):
    """Everything `kvatlas router` can be told."""

    host: str = Field("0.0.0.0", description="address of the public port")
    port: int = Field(8080, ge=0, le=65535, description="public port, OpenAI-compatible; 0 takes any")
    admin_host: str = Field("127.0.0.1", description="address of the admin port")
    admin_port: int = Field(8082, ge=0, le=65535, description="admin port: /debug/route, /metrics; 0 takes any")
    indexers: Annotated[tuple[Annotated[str, AfterValidator(_host_port)], ...], Spelled(flag="--indexer")] = Field(
        ("127.0.0.1:50051",),
        max_length=64,
        description="<host:port>; a name stands for all its addresses",
    )
    lookup_deadline_ms: float = Field(20.0, gt=0, le=10_000, description="how long an index lookup may take")
    policy: PolicyName = Field(
        PolicyName.PRECISE,
        description="how engines are chosen: precise (what each holds, by the index), estimate (what each was sent), "
        "session, consistent-hash (how the prompt begins), least-load, power-of-two, round-robin, random",
    )
    fallback: tuple[PolicyName, ...] | None = Field(
        None, max_length=8, description="policies asked in turn when the one before has no answer; least-load is last"
    )
    temperature_ms: float = Field(
        0.0, ge=0, le=60_000, description="precise and estimate: how much worse an engine may be and still be tried"
    )
    model_policies: Annotated[tuple[ModelPolicy, ...], Spelled(flag="--model-policy", split=lambda text: [text])] = (
        Field(
            (),
            max_length=1000,
            description="for one model: <name>,policy=<policy>[,fallback=<policy>+...][,temperature-ms=N]"
            "[,label.<name>=<value>...]; with labels, only engines that have them",
        )
    )
    seed: int | None = Field(None, description="makes policies that draw lots repeatable")
    state_dir: Path | None = Field(None, description="where the last known fleet is kept")
    model_files: Annotated[tuple[Annotated[str, AfterValidator(_name_path)], ...], Spelled(flag="--model-files")] = (
        Field((), max_length=1000, description="<model name>=<path or hub name> of tokenizer files")
    )
    connect_timeout_s: Seconds = Field(2.0, description="to connect to an engine")
    first_byte_timeout_s: Seconds = Field(600.0, description="from sending a request to the first byte of its answer")
    idle_timeout_s: Seconds = Field(300.0, description="between two pieces of an answer")
    request_timeout_s: Seconds = Field(24 * 3600.0, description="a whole request, from its arrival to its last byte")
    attempts: int = Field(3, ge=1, le=16, description="engines tried for one request")
    body_bytes_max: int = Field(64 * 1024 * 1024, ge=1024, description="largest request body")
    body_timeout_s: Seconds = Field(60.0, description="for a request's body to arrive")
    in_flight_max: int = Field(4096, ge=1, description="requests at a time; more are answered 503")
    engine_waiting_max: int = Field(
        32, ge=0, description="requests waiting in an engine from which on it is saturated; 0: it never is"
    )
    engine_kv_usage_max: float = Field(
        0.97, gt=0, description="KV cache in use (0..1) from which on a quarter as many saturate an engine"
    )
    engine_in_flight_max: int = Field(
        0, ge=0, description="requests of this router at one engine, where it shows no figures; 0: no limit"
    )
    queue_max: int = Field(
        1024, ge=0, description="requests that wait, per model, while all its engines are saturated; more get a 429"
    )
    queue_deadline_s: Seconds = Field(60.0, description="how long a request may wait there before it gets a 429")
    eject_after: int = Field(
        5, ge=0, description="faults in a row that eject an engine, as half of its last requests do; 0: nothing does"
    )
    ejection_s: Seconds = Field(10.0, description="for how long; a second time twice as long, up to 12 times")
    ejected_share_max: float = Field(
        0.5, ge=0, le=1, description="share of the fleet ejected at most; one may always be"
    )
    slow_start_s: float = Field(
        15.0, ge=0, le=3600, description="for an engine that joins others at work to reach its share of load; 0: off"
    )
    drain_delay_s: float = Field(1.0, ge=0, le=3600, description="after SIGTERM: /readyz fails, requests are taken")
    drain_s: Seconds = Field(300.0, description="after that: how long requests in flight may take to finish")
    api_keys: tuple[SecretStr, ...] = Field(
        (), max_length=1000, description="keys this router asks of its clients; none: anybody may ask"
    )
    session_header: str = Field("x-session-id", pattern=r"^[A-Za-z0-9-]+$", description="names a request's session")
    session_cookie: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="cookie that names it where the header is not there"
    )
    labels_header: str = Field(
        "x-kvatlas-labels",
        pattern=r"^[A-Za-z0-9-]+$",
        description="header by which a request asks for engines with labels: task=chat,tier=gold",
    )
    request_usage: bool = Field(False, description="ask engines for a usage chunk at the end of streams, and drop it")
    allow_kv_cache_report_mode: bool = Field(False, description="let clients make engines re-announce hits")
    parity_interval_s: Seconds = Field(300.0, description="how often local tokens are checked against engines")
    remote_tokenize_timeout_s: Seconds = Field(2.0, description="for an engine to tokenise a prompt")

    def plans(self) -> Plans:
        default = Plan.of(self.policy, self.fallback, temperature_ms=self.temperature_ms)
        return Plans(default, {rule.model: rule.plan(self) for rule in self.model_policies})

    @model_validator(mode="after")
    def _someone_knows_engines(self) -> Self:
        if not (self.engines or self.indexers or self.state_dir):
            raise ValueError("neither indexers nor engines are given: the router would know no engine")
        return self
