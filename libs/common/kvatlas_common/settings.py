"""One frozen, validated model of settings for each service, complete before anything starts.

Defaults, then a YAML file (`--config FILE` or `KVATLAS_CONFIG`), then `KVATLAS_*` variables, then flags: the last one
wins. Every problem is reported at once, under the name its author wrote and with the cure.

pydantic does the validation. `pydantic-settings` does not serve here: it merges its sources before it validates, so a
problem can no longer be told by the flag, variable or key it came from, and it reads the process's own argv and
environment. Both are arguments here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    ValidationError,
    ValidationInfo,
)
from pydantic.fields import FieldInfo

from kvatlas_common.engines.plain_yaml import load_plain_yaml
from kvatlas_common.engines.specs import EngineDefaults, EngineSource, EngineSpec, clashes, parse_source, split_list
from kvatlas_common.engines.spelling import camel, did_you_mean, snake
from kvatlas_common.logs import LogFormat, LogLevel
from kvatlas_common.settings_flags import (
    CONFIG_VARIABLE,
    ENV_PREFIX,
    NO_VALUE,
    Spelled,
    build_parser,
    flag_of,
    is_list,
    is_secret,
    split_text,
    variable_of,
)

M = TypeVar("M", bound=BaseModel)
HashAlgo = Literal["sha256", "sha256_cbor", "sha256_cbor_64bit", "xxhash", "xxhash_cbor"]


class Settings(BaseModel):
    """What every settings model and mixin is: frozen, and without room for misspelled names."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class HashSettings(Settings):
    """How engines hash blocks. Nothing is needed: what is not given is discovered from live events."""

    block_size: int | None = Field(
        default=None, ge=1, le=65536, description="tokens per block, as in vLLM's --block-size"
    )
    hash_seed: str | None = Field(default=None, min_length=1, description="the engines' PYTHONHASHSEED")
    prefix_caching_hash_algo: HashAlgo | None = Field(
        default=None, description="as in vLLM's --prefix-caching-hash-algo"
    )
    model: str | None = Field(default=None, min_length=1, description="path or hub name of the model's tokenizer files")


def _source(written: object, info: ValidationInfo) -> EngineSource:
    said = info.data
    defaults = EngineDefaults(
        **{name: said[name] for name in ("engine_port", "zmq_dial_port", "zmq_replay_port") if name in said},
        api_key=said.get("engine_api_key"),
    )
    return parse_source(written, defaults, (info.context or {}).get("environ"))


def _without_clashes(sources: tuple[EngineSource, ...]) -> tuple[EngineSource, ...]:
    problems = clashes([source for source in sources if isinstance(source, EngineSpec)])
    if problems:
        raise ValueError("; ".join(problems))
    return sources


Port = Annotated[int, Field(ge=1, le=65535)]


class EngineSettings(Settings):
    """Which engines there are and how they are reached."""

    engine_port: Port = Field(default=8000, description="HTTP port of engines that name none")
    zmq_dial_port: Port | None = Field(
        default=None,
        description="dial KV events here on engines that name no endpoint (5557, usually); rank N at port+N",
    )
    zmq_replay_port: Port | None = Field(
        default=None, description="ask for missed KV events here on engines that name no endpoint (5558, usually)"
    )
    engine_api_key: SecretStr | None = Field(default=None, description="API key of engines that name none")
    engine_refresh_s: float = Field(
        default=5.0, gt=0, le=3600, description="how often files and names are looked at again"
    )
    engines: Annotated[
        tuple[Annotated[EngineSource, PlainValidator(_source), PlainSerializer(str)], ...],
        AfterValidator(_without_clashes),
        Spelled(flag="--engine", split=split_list),
    ] = Field(
        default=(),
        max_length=10_000,
        description="an engine, 127.0.0.1:8001,events=5557,replay=5558,ranks=2,api-key-env=NAME; or every address of a "
        "name, dns:vllm.default.svc:8000; or the list in a file, file:engines.yaml",
    )

    def engine_defaults(self) -> EngineDefaults:
        """What holds for engines that a watched file lists."""
        return EngineDefaults(self.engine_port, self.zmq_dial_port, self.zmq_replay_port, self.engine_api_key)


class LogSettings(Settings):
    """What is logged, to standard error."""

    log_level: LogLevel = Field(default="info", description="the least of what is logged")
    log_format: LogFormat = Field(
        default="auto", description="JSON lines, text, or text on a terminal and JSON elsewhere"
    )


def load(model: type[M], argv: Sequence[str], environ: Mapping[str, str], *, prog: str, description: str = "") -> M:
    """The settings of a service, from `argv` (without the program's name), `environ` and the file that they name.

    Raises `SystemExit`: 2 when there are problems, with all of them on standard error; 0 after `-h`.
    """
    flags, config = _read_flags(model, argv, build_parser(model, prog, description))
    variables = _read_environment(model, environ)
    path = config or environ.get(CONFIG_VARIABLE)
    layers = [_read_file(model, Path(path)) if path else _Layer(), variables, flags]
    values = {name: value for layer in layers for name, value in layer.values.items()}
    problems = [problem for layer in layers for problem in layer.problems]
    settings: M | None = None
    try:
        written = {name: value.value for name, value in values.items()}
        settings = model.model_validate(written, context={"environ": environ})
    except ValidationError as error:
        problems += [_problem(model, values, dict(detail)) for detail in error.errors(include_url=False)]
    for warning in (warning for layer in layers for warning in layer.warnings):
        print(f"{prog}: warning: {warning}", file=sys.stderr)
    if settings is None or problems:
        print(f"{prog}: the settings cannot be used:", *problems, sep="\n  ", file=sys.stderr)
        print(f"See {prog} -h", file=sys.stderr)
        raise SystemExit(2)
    return settings


_POLICY = ("prefixCache", "trackingConfig", "indexerConfig", "tokenProcessorConfig")
_KUBERNETES = frozenset({"apiVersion", "kind", "metadata", "status"})
_DEPTH_MAX = 16
_FILE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class _Value:
    """What was written, and where: `--block-size`, `KVATLAS_BLOCK_SIZE`, `kvatlas.yaml: blockSize`."""

    value: Any
    where: str


@dataclass(slots=True)
class _Layer:
    """What one source says, by field."""

    values: dict[str, _Value] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _read_flags(
    model: type[BaseModel], argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[_Layer, str | None]:
    """What the flags say, and the file that `--config` names."""
    layer = _Layer()
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        layer.problems.append(str(error))
        return layer, None
    config = known.config
    if config is NO_VALUE:
        layer.problems.append("--config needs a file")
        config = None
    for name, info in model.model_fields.items():
        said = getattr(known, name, None)
        if said is None:
            continue
        if said is NO_VALUE or (isinstance(said, list) and NO_VALUE in said):
            layer.problems.append(f"{flag_of(name, info)} needs a value: {info.description}")
        else:
            value = [piece for text in said for piece in split_text(info, text)] if isinstance(said, list) else said
            layer.values[name] = _Value(value, flag_of(name, info))
    flags = [flag_of(name, info) for name, info in model.model_fields.items()] + ["--config"]
    after_flag = False
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            layer.problems.append(f"{name} is not a flag{did_you_mean(name, flags)}")
        elif not after_flag:  # else it is most likely the unknown flag's value
            layer.problems.append(f"{word!r} is not expected: every setting is a flag")
        after_flag = word.startswith("-") and "=" not in word
    return layer, config


def _read_environment(model: type[BaseModel], environ: Mapping[str, str]) -> _Layer:
    """An empty variable says nothing, as in a compose file's `${NAME:-}`."""
    layer = _Layer()
    links = tuple(name.removesuffix("SERVICE_HOST") for name in environ if name.endswith("_SERVICE_HOST"))
    variables = {variable_of(name): name for name in model.model_fields}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE or not text:
            continue
        # Kubernetes describes a service `kvatlas-engine` to every pod, in KVATLAS_ENGINE_PORT among others.
        if any(variable == f"{link}PORT" or variable.startswith((f"{link}SERVICE_", f"{link}PORT_")) for link in links):
            continue
        name = variables.get(variable)
        if name is None:
            layer.warnings.append(f"{variable} is not a setting{did_you_mean(variable, variables)}")
            continue
        info = model.model_fields[name]
        layer.values[name] = _Value(split_text(info, text) if is_list(info) else text, variable)
    return layer


def _read_file(model: type[BaseModel], path: Path) -> _Layer:
    layer = _Layer()
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ValueError(f"it is larger than {_FILE_BYTES_MAX} bytes")
        document = load_plain_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        layer.problems.append(f"{path}: the file cannot be read: {reason}")
        return layer
    if document is None:
        return layer
    if not isinstance(document, dict):
        layer.problems.append(f"{path}: settings are written as `name: value`")
        return layer
    ignored = _KUBERNETES if "kind" in document and "apiVersion" in document else frozenset()
    hashes = {name: info for name, info in model.model_fields.items() if name in HashSettings.model_fields}
    policy = _Layer()
    for key, value in document.items():
        policies = list(_policies(value, (str(key),)))
        if snake(str(key)) in model.model_fields or not (policies or key in ignored):
            _take(layer, model.model_fields, str(key), value, f"{path}: {key}")
        for trail, said in policies:
            for name, inner in said.items():
                _take(policy, hashes, str(name), inner, f"{path}: {trail}.{name}")
    return _Layer(policy.values | layer.values, layer.problems + policy.problems)


def _take(layer: _Layer, known: Mapping[str, FieldInfo], key: str, value: object, where: str) -> None:
    """One `key: value` of a file into its layer, under any spelling of the key."""
    name = snake(key)
    if name not in known:
        layer.problems.append(f"{where} is not a setting{did_you_mean(key, map(camel, known))}")
    elif name in layer.values:
        layer.problems.append(f"{where} is given twice, spelled differently")
    elif value is not None:
        is_text_of_list = is_list(known[name]) and isinstance(value, str)
        layer.values[name] = _Value(split_text(known[name], str(value)) if is_text_of_list else value, where)


def _policies(node: object, trail: tuple[str, ...]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every `prefixCache.trackingConfig.indexerConfig.tokenProcessorConfig` at or under a node, with its path."""
    if not isinstance(node, dict) or len(trail) > _DEPTH_MAX:
        return
    if trail[-len(_POLICY) :] == _POLICY:
        yield ".".join(trail), node
        return
    for key, value in node.items():
        yield from _policies(value, (*trail, str(key)))


def _problem(model: type[BaseModel], values: Mapping[str, _Value], detail: Mapping[str, Any]) -> str:
    """One problem of validation, under the name its author wrote."""
    message = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else str(detail["msg"])
    message = message[:1].lower() + message[1:]
    if not detail["loc"]:
        return message
    name = str(detail["loc"][0])
    info = model.model_fields.get(name)
    if info is None or name not in values:
        return f"{camel(name)} ({variable_of(name)}): {message}"
    where = values[name].where
    if len(detail["loc"]) > 1:
        return f"{where}, item {int(detail['loc'][1]) + 1}: {message}"
    # An item may hold a key, and a secret is one.
    shown = f" {detail['input']}" if isinstance(detail["input"], str | int | float) and not is_secret(info) else ""
    return f"{where}{shown}: {message} ({info.description})"
