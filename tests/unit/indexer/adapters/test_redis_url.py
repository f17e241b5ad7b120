"""Where a store is, and whether what was found there will do."""

from __future__ import annotations

import pytest

from kvatlas_indexer.adapters.redis_client import StoreUnavailable, check_policy, check_version
from kvatlas_indexer.adapters.redis_url import Layout, StoreUrl


@pytest.mark.parametrize(
    ("text", "layout", "addresses", "shown"),
    [
        ("redis://h", Layout.SINGLE, (("h", 6379),), "redis://h:6379/0"),
        ("redis://u:p@h:1/2", Layout.SINGLE, (("h", 1),), "redis://u@h:1/2"),
        ("redis://:p%40%3A@[::1]:7/?db=4", Layout.SINGLE, (("::1", 7),), "redis://[::1]:7/4"),
        ("rediss://h?ca=/x", Layout.SINGLE, (("h", 6379),), "rediss://h:6379/0"),
        (
            "redis+sentinel://u:p@a,b:2/main/3",
            Layout.SENTINEL,
            (("a", 26379), ("b", 2)),
            "redis+sentinel://u@a:26379,b:2/main/3",
        ),
        ("rediss+cluster://a,b:2,c/", Layout.CLUSTER, (("a", 6379), ("b", 2), ("c", 6379)), None),
    ],
)
def test_a_url_is_read(text: str, layout: Layout, addresses: tuple[tuple[str, int], ...], shown: str | None) -> None:
    url = StoreUrl.parse(text)
    assert (url.layout, url.addresses) == (layout, addresses)
    assert shown is None or str(url) == shown
    assert StoreUrl.parse(str(url)).addresses == addresses


def test_a_password_is_read_and_never_shown() -> None:
    url = StoreUrl.parse("redis+sentinel://me:s3%2Fcret@h/main?sentinel_password=t0psecret")
    assert (url.password, url.options["sentinel_password"]) == ("s3/cret", "t0psecret")
    assert "cret" not in f"{url} {url!r}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http://secret@h", "begins with"),
        ("h:6379", "begins with"),
        ("redis://a,b", "several servers"),
        ("redis://u:secret@h:99999", "not <host>"),
        ("redis://u:secret@", "not <host>"),
        ("redis://h/x", "not a database number"),
        ("redis://h/1/2", "nothing else"),
        ("redis+sentinel://h", "<service>"),
        ("redis+cluster://h/1", "only database 0"),
        ("redis://h?tls=secret", "unknown option tls"),
        ("unix://", "path of a socket"),
    ],
)
def test_a_url_that_cannot_be_says_why(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        StoreUrl.parse(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("version", "good"), [("6.0.16", False), ("6.2.0", True), ("7.2.4", True), ("10.1", True)])
def test_versions(version: str, good: bool) -> None:
    if good:
        check_version({"redis_version": version}, "here")
    else:
        with pytest.raises(StoreUnavailable, match=r"6\.2"):
            check_version({"redis_version": version}, "here")


def test_a_policy_matters_only_where_memory_is_limited() -> None:
    check_policy({"maxmemory": "0", "maxmemory_policy": "allkeys-lru"}, "here", evictions_allowed=False)
    check_policy({"maxmemory": "9", "maxmemory_policy": "noeviction"}, "here", evictions_allowed=False)
    evicting = {"maxmemory": "9", "maxmemory_policy": "allkeys-lru"}
    assert "allkeys-lru" in check_policy(evicting, "here", evictions_allowed=True)
    with pytest.raises(StoreUnavailable, match="Cure"):
        check_policy({"maxmemory": "9", "maxmemory_policy": "allkeys-lru"}, "here", evictions_allowed=False)
