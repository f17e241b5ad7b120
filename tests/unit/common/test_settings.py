"""Settings of both services: precedence, spelling, and what is said of problems."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, SecretStr, model_validator

from kvatlas_common.engines.specs import EngineFile, parse_engine, parse_source
from kvatlas_common.settings import EngineSettings, HashSettings, LogSettings, load


class Service(HashSettings, EngineSettings, LogSettings):
    """The service itself."""

    zmq_listen: tuple[str, ...] = Field(default=(), description="where engines connect to")
    deadline_ms: float = Field(default=20.0, gt=0, description="how long a lookup may take; 100% of it")
    page: bool = Field(default=True, description="serve the page")

    @model_validator(mode="after")
    def _listens_somewhere(self) -> Service:
        if self.deadline_ms > 1000 and not self.zmq_listen:
            raise ValueError("a deadline over a second needs --zmq-listen")
        return self


def loaded(*argv: str, **environ: str) -> Service:
    return load(Service, argv, environ, prog="kvatlas test", description="A test.")


def problems(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        loaded(*argv, **environ)
    assert stopped.value.code == 2
    first, *lines, last = capsys.readouterr().err.splitlines()
    assert first == "kvatlas test: the settings cannot be used:"
    assert last == "See kvatlas test -h"
    return [line.strip() for line in lines]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kvatlas.yaml"


def test_nothing_is_needed() -> None:
    settings = loaded()
    assert settings == Service()
    assert (settings.block_size, settings.engine_port, settings.log_level) == (None, 8000, "info")


def test_flags_win_over_variables_over_file_over_defaults(file: Path) -> None:
    file.write_text("blockSize: 16\nhashSeed: 1\nmodel: file\ndeadlineMs: 5\n")
    variables = {"KVATLAS_HASH_SEED": "2", "KVATLAS_MODEL": "variable", "KVATLAS_CONFIG": str(file)}
    settings = loaded("--model", "flag", **variables)
    assert (settings.block_size, settings.hash_seed, settings.model, settings.deadline_ms) == (16, "2", "flag", 5.0)
    assert settings.log_format == "auto"


def test_the_flag_names_the_file_over_the_variable(file: Path, tmp_path: Path) -> None:
    file.write_text("model: mine")
    assert loaded("--config", str(file), KVATLAS_CONFIG=str(tmp_path / "missing")).model == "mine"


@pytest.mark.parametrize("spelling", ["prefixCachingHashAlgo", "prefix_caching_hash_algo", "prefix-caching-hash-algo"])
def test_the_file_takes_any_spelling(file: Path, spelling: str) -> None:
    file.write_text(f"{spelling}: sha256_cbor")
    assert loaded("--config", str(file)).prefix_caching_hash_algo == "sha256_cbor"


@pytest.mark.parametrize("seed", ["42", "042", "1_000", "0x2A", "1e3", "vllm-none-hash", "yes", "'null'"])
def test_a_hash_seed_is_the_text_that_was_written(file: Path, seed: str) -> None:
    file.write_text(f"hashSeed: {seed}")
    assert loaded("--config", str(file)).hash_seed == seed.strip("'")
    assert HashSettings(hash_seed=42).hash_seed == "42"  # type: ignore[arg-type]


def test_null_in_the_file_and_an_empty_variable_say_nothing(file: Path) -> None:
    file.write_text("hashSeed:\nmodel: null\n")
    assert loaded("--config", str(file), KVATLAS_BLOCK_SIZE="") == Service()
    file.write_text("")
    assert loaded("--config", str(file)) == Service()


@pytest.mark.parametrize(
    "policy",
    [
        "prefixCache: {mode: tracking, trackingConfig: {indexerConfig: {tokenProcessorConfig: %s}}}",
        "profile: {single: {trafficPolicy: {prefixCache: {mode: tracking, trackingConfig: {indexerConfig: "
        "{tokenProcessorConfig: %s}}}}}}",
        "apiVersion: v1\nkind: Policy\nmetadata: {name: x}\nspec: {profile: {single: {trafficPolicy: {prefixCache: "
        "{trackingConfig: {indexerConfig: {tokenProcessorConfig: %s}}}}}}}",
    ],
)
def test_the_policy_that_users_have_is_understood(file: Path, policy: str) -> None:
    file.write_text(policy % "{blockSize: 64, hashSeed: 42, model: Qwen/Qwen3-32B}" + "\nhashSeed: 7\n")
    settings = loaded("--config", str(file))
    assert (settings.block_size, settings.hash_seed, settings.model) == (64, "7", "Qwen/Qwen3-32B")


def test_a_mistake_inside_the_policy_is_named_with_its_path(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("prefixCache: {trackingConfig: {indexerConfig: {tokenProcessorConfig: {blocksize: 64}}}}")
    (problem,) = problems(capsys, "--config", str(file))
    trail = "prefixCache.trackingConfig.indexerConfig.tokenProcessorConfig.blocksize"
    assert problem == f"{file}: {trail} is not a setting; did you mean blockSize?"


def test_lists_are_repeated_or_separated_by_commas_or_yaml(file: Path) -> None:
    listens = ("tcp://*:5557", "tcp://*:5558")
    assert loaded("--zmq-listen", listens[0], "--zmq-listen", listens[1]).zmq_listen == listens
    assert loaded(KVATLAS_ZMQ_LISTEN=", ".join(listens)).zmq_listen == listens
    file.write_text(f"zmqListen: ['{listens[0]}', '{listens[1]}']")
    assert loaded("--config", str(file)).zmq_listen == listens


def test_engines_from_flags_variables_and_file(file: Path) -> None:
    texts = ["127.0.0.1:8001,events=5557,ranks=2", "b"]
    expected = tuple(parse_engine(text) for text in texts)
    assert loaded("--engine", texts[0], "--engine", texts[1]).engines == expected
    assert loaded(KVATLAS_ENGINES=",".join(texts)).engines == expected
    file.write_text("engines:\n- {address: 127.0.0.1:8001, events: 5557, ranks: 2}\n- b\n")
    assert loaded("--config", str(file)).engines == expected
    file.write_text(f"engines: {','.join(texts)}")
    assert loaded("--config", str(file)).engines == expected
    assert loaded("--engine", "file:e.yaml").engines == (EngineFile(Path("e.yaml")),)
    assert loaded("--engine", "dns:b:1").engines == (parse_source("dns:b:1"),)


def test_engines_take_ports_and_keys_from_the_other_settings() -> None:
    argv = ("--engine", "a", "--engine", "b,api-key-env=B_KEY", "--zmq-dial-port", "5557", "--engine-port", "9000")
    settings = loaded(*argv, KVATLAS_ENGINE_API_KEY="all", B_KEY="own")
    a, b = settings.engines
    assert (str(a), str(b)) == ("a:9000", "b:9000")
    assert [getattr(e, "events", "") for e in (a, b)] == ["tcp://a:5557", "tcp://b:5557"]
    assert [getattr(e, "api_key", "") for e in (a, b)] == [SecretStr("all"), SecretStr("own")]
    defaults = settings.engine_defaults()
    assert (defaults.engine_port, defaults.zmq_dial_port, defaults.api_key) == (9000, 5557, SecretStr("all"))
    shown = f"{settings!r} {settings.model_dump_json()}"
    assert "'all'" not in shown
    assert "own" not in shown


@pytest.mark.parametrize("argv", [("--no-page",), ("--page=false",), ("--page", "no")])
def test_truth_has_two_flags(argv: tuple[str, ...]) -> None:
    assert loaded(*argv).page is False
    assert loaded("--page", KVATLAS_PAGE="false").page is True


def test_every_problem_is_said_at_once_under_the_name_it_was_written(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("logLevel: loud\nengnePort: 7\nmodel: a\nzmq-dial-port: 99999\nzmq_dial_port: 1\n")
    argv = ("--config", str(file), "--block-size", "0", "--blok-size", "3", "stray", "--hash-seed", "--page", "maybe")
    said = problems(capsys, *argv, "--engine", "a:1,ranks=x", KVATLAS_DEADLINE_MS="soon")
    expected = [
        f"{file}: engnePort is not a setting; did you mean enginePort?",
        f"{file}: zmq_dial_port is given twice, spelled differently",
        "--hash-seed needs a value: the engines' PYTHONHASHSEED",
        "--blok-size is not a flag; did you mean --block-size?",
        f"{file}: logLevel loud: input should be 'debug', 'info', 'warning' or 'error' (the least of what is logged)",
        f"{file}: zmq-dial-port 99999: input should be less than or equal to 65535",
        "--engine, item 1: ranks: input should be a valid integer",
        "--block-size 0: input should be greater than or equal to 1 (tokens per block, as in vLLM's --block-size)",
        "KVATLAS_DEADLINE_MS soon: input should be a valid number",
        "--page maybe: input should be a valid boolean",
    ]
    for begin in expected:
        assert any(problem.startswith(begin) for problem in said), (begin, said)
    assert len(said) == len(expected) + 1  # and the stray word
    assert "'stray' is not expected: every setting is a flag" in said


def test_what_the_model_finds_is_said_as_it_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(capsys, "--deadline-ms", "2000") == ["a deadline over a second needs --zmq-listen"]


def test_engines_that_clash_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems(capsys, "--engine", "a:1", "--engine", "a:2", "--zmq-dial-port", "5557")
    assert problem.startswith("--engine: engines a:1 and a:2 cannot both publish at tcp://a:5557")


def test_a_secret_is_never_said_back_and_has_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    said = problems(capsys, "--engine", "a:1,api-key=sesame", "--engine-api-key", "sesame", "--block-size", "x")
    assert len(said) == 3
    assert "sesame" not in " ".join(said)


@pytest.mark.parametrize("text", ["- a", "a: [", "\t", "a"])
def test_a_file_that_is_no_settings_file(file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(text)
    (problem,) = problems(capsys, KVATLAS_CONFIG=str(file))
    assert problem.startswith(f"{file}: ")


def test_a_missing_file_and_a_missing_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems(capsys, "--config", str(tmp_path / "x.yaml"))
    assert problem == f"{tmp_path / 'x.yaml'}: the file cannot be read: No such file or directory"
    assert problems(capsys, "--config") == ["--config needs a file"]


def test_a_variable_that_is_no_setting_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    loaded(KVATLAS_BLOK_SIZE="3", OTHER="1")
    said = capsys.readouterr().err
    assert said == "kvatlas test: warning: KVATLAS_BLOK_SIZE is not a setting; did you mean KVATLAS_BLOCK_SIZE?\n"


def test_what_kubernetes_tells_every_pod_of_a_service_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    settings = loaded(
        KVATLAS_ENGINE_SERVICE_HOST="10.0.0.1",
        KVATLAS_ENGINE_SERVICE_PORT="8000",
        KVATLAS_ENGINE_PORT="tcp://10.0.0.1:8000",
        KVATLAS_ENGINE_PORT_8000_TCP_ADDR="10.0.0.1",
        KVATLAS_ENGINE_REFRESH_S="7",
    )
    assert (settings.engine_port, settings.engine_refresh_s) == (8000, 7.0)
    assert capsys.readouterr().err == ""


def test_help_teaches_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        loaded("-h")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, info in Service.model_fields.items():
        assert info.description
        assert f"KVATLAS_{name.upper()}" in text
    assert (
        "--deadline-ms N how long a lookup may take; 100% of it (default: 20.0; KVATLAS_DEADLINE_MS, deadlineMs)"
        in text
    )
    assert "{sha256,sha256_cbor,sha256_cbor_64bit,xxhash,xxhash_cbor}" in text
    assert "The service itself:" in text


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded().block_size = 3
