"""Reports to an indexer: which go at once, which together, and what happens when it is slow."""

from __future__ import annotations

import asyncio
from itertools import count

from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_router.adapters.outbox import QUEUED_MAX, TOGETHER_BYTES_MAX, TOGETHER_MAX, Outbox

names = map(str, count())


def routed(key_bytes: int = 8) -> pb.Observation:
    keys = pb.PromptKeys(profile="p", keys=bytes(key_bytes))
    return pb.Observation(request_id=next(names), routed=pb.Routed(prompts=[keys]))


def first_token() -> pb.Observation:
    return pb.Observation(request_id=next(names), first_token=pb.FirstToken(ttft_s=0.1))


def told(message: pb.Observation) -> list[str]:
    return [each.request_id for each in (message, *message.also)]


async def taken(outbox: Outbox) -> list[str]:
    async with asyncio.timeout(30):
        return told(await outbox.take())


def filled(*reports: pb.Observation, many: bool = True) -> Outbox:
    outbox = Outbox(lambda: None)
    outbox.many = many
    for report in reports:
        outbox.put(report)
    return outbox


async def is_at_once(outbox: Outbox) -> bool:
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    done = taking.done()
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    return done


async def test_what_could_not_be_told_is_told_again_first_and_one_by_one_where_that_is_needed() -> None:
    reports = [first_token(), routed(), first_token()]
    outbox = filled(*reports)
    message = await outbox.take()
    outbox.put(later := routed())
    outbox.put_back(message)
    outbox.many = False
    names = [report.request_id for report in [*reports, later]]
    assert [await taken(outbox) for _ in names] == [[name] for name in names]


async def test_where_a_request_was_sent_is_told_at_once_and_the_rest_soon() -> None:
    assert await is_at_once(filled(routed()))
    outbox = filled(token := first_token())
    assert not await is_at_once(outbox)
    assert await taken(outbox) == [token.request_id]


async def test_what_is_to_be_told_goes_together_and_in_its_order() -> None:
    reports = [first_token(), first_token(), routed(), first_token()]
    before = [report.SerializeToString() for report in reports]
    outbox = filled(*reports)
    assert await taken(outbox) == [report.request_id for report in reports]
    assert [report.SerializeToString() for report in reports] == before  # they are kept elsewhere too
    assert not await is_at_once(outbox)


async def test_an_indexer_that_does_not_read_many_is_told_one_by_one() -> None:
    reports = [routed(), first_token(), routed()]
    outbox = filled(*reports, many=False)
    assert [await taken(outbox) for _ in reports] == [[report.request_id] for report in reports]


async def test_a_message_is_bounded_in_reports_and_bytes() -> None:
    outbox = filled(*(routed() for _ in range(TOGETHER_MAX + 3)))
    assert [len(await taken(outbox)) for _ in range(2)] == [TOGETHER_MAX + 1, 2]
    outbox = filled(*(routed(TOGETHER_BYTES_MAX // 3) for _ in range(3)))
    assert [len(await taken(outbox)) for _ in range(2)] == [2, 1]
    assert len(await taken(filled(routed(2 * TOGETHER_BYTES_MAX)))) == 1


async def test_one_too_many_is_dropped_and_counted() -> None:
    dropped: list[None] = []
    outbox = Outbox(lambda: dropped.append(None))
    outbox.many = True
    for report in (reports := [routed() for _ in range(QUEUED_MAX + 2)]):
        outbox.put(report)
    assert len(dropped) == 2
    heard: list[str] = []
    while len(heard) < QUEUED_MAX:
        heard += await taken(outbox)
    assert heard == [report.request_id for report in reports[:QUEUED_MAX]]


async def test_after_a_pause_it_begins_anew() -> None:
    outbox = filled(first_token())
    await taken(outbox)
    outbox.put(last := first_token())
    assert not await is_at_once(outbox)
    assert await taken(outbox) == [last.request_id]
