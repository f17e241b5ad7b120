"""What the router can be told, and what it refuses to be told."""

from __future__ import annotations

import pytest

from kvatlas_common.settings import load
from kvatlas_router.settings import RouterSettings


def read(*argv: str, **environ: str) -> RouterSettings:
    return load(RouterSettings, argv, environ, prog="kvatlas router")


def test_defaults_are_those_of_the_contract() -> None:
    settings = read()
    assert (settings.port, settings.admin_port, settings.admin_host) == (8080, 8082, "127.0.0.1")
    assert settings.lookup_deadline_ms == 20
    assert settings.body_bytes_max == 64 * 1024 * 1024
    assert (settings.connect_timeout_s, settings.first_byte_timeout_s, settings.idle_timeout_s) == (2, 600, 300)
    assert settings.request_timeout_s == 24 * 3600
    assert settings.policy == "precise"
    assert (settings.engine_waiting_max, settings.queue_max, settings.queue_deadline_s) == (32, 1024, 60)
    assert (settings.eject_after, settings.ejection_s, settings.slow_start_s) == (5, 10, 15)
    assert not settings.request_usage
    assert not settings.allow_kv_cache_report_mode


def test_flags_and_variables() -> None:
    settings = read(
        "--engine", "127.0.0.1:8001", "--engine", "127.0.0.1:8002", "--indexer", "a:1,b:2",
        "--model-files", "m=/models/m",
        KVATLAS_API_KEYS="one,two", KVATLAS_POLICY="random",
    )  # fmt: skip
    assert [str(getattr(e, "id", "")) for e in settings.engines] == ["127.0.0.1:8001", "127.0.0.1:8002"]
    assert settings.indexers == ("a:1", "b:2")
    assert settings.model_files == ("m=/models/m",)
    assert [k.get_secret_value() for k in settings.api_keys] == ["one", "two"]
    assert settings.policy == "random"


def test_all_problems_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--indexer", "nowhere", "--policy", "best", "--model-files", "m", "--attempts", "0")
    said = capsys.readouterr().err
    for flag in ("--indexer", "--policy", "--model-files", "--attempts"):
        assert flag in said


def test_keys_are_not_shown() -> None:
    assert "s3cret" not in repr(read(KVATLAS_API_KEYS="s3cret"))
