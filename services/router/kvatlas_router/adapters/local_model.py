"""A model's tokens made here: its files loaded off the request path, its pipeline used by one thread at a time.

That thread is its own, or the event loop's for prompts that take less time than handing them over: short ones, and with
an encoder that is fast all but very long ones. What a fast encoder said is checked beside, in the model's own thread;
when it was wrong, nothing made with it is used again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from kvatlas_common.prompts import BadModelFiles, ModelFilesMissing, PromptPipeline, find_model_files
from kvatlas_common.prompts.encoders import CheckedEncoder
from kvatlas_router.adapters.metrics import Metrics

log = logging.getLogger(__name__)

INLINE_BYTES = 4096  # a body that takes less time to tokenise than to hand to a thread
FAST_INLINE_BYTES = 64 * 1024  # the same with a fast encoder: three milliseconds if all of it is new
RELOAD_AFTER_S = 60.0

T = TypeVar("T")


class LocalModel:
    """A model's pipeline and the thread that runs it. `failure`: why there is no pipeline."""

    def __init__(self, wanted: tuple[str, ...], environ: Mapping[str, str], metrics: Metrics) -> None:
        self.wanted = wanted
        self.pipeline: PromptPipeline | None = None
        self.failure = "its files are being loaded"
        self._environ = environ
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        self._running: set[Future[Any]] = set()
        self._loading: asyncio.Task[None] | None = None
        self._load_after = 0.0
        self._checking: asyncio.Task[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether its files were looked for in vain."""
        return self.pipeline is None and self._loading is None and self._load_after > 0

    async def loaded(self) -> PromptPipeline | None:
        """Waits for a load under way; starts one when none was tried, or the last failed a while ago."""
        if self.pipeline is None and self._loading is None and time.monotonic() >= self._load_after:
            self._loading = asyncio.create_task(self._load())
        if self._loading is not None:
            await asyncio.shield(self._loading)
        return self.pipeline

    async def run(self, job: Callable[[], T], size: int) -> T:
        """`size`: bytes to be worked on, which decides where."""
        encoder = self.pipeline.tokenizer.encoder if self.pipeline is not None else None
        checked = encoder if isinstance(encoder, CheckedEncoder) else None
        if checked is not None and checked.due and self._checking is None:
            self._checking = asyncio.create_task(self._check(checked))
        fast = checked is not None and checked.difference is None
        if size <= (FAST_INLINE_BYTES if fast else INLINE_BYTES) and not self._running:
            return job()
        running = self._thread.submit(job)
        self._running.add(running)
        running.add_done_callback(self._running.discard)  # also when nobody waits for it any more
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        for task in (self._loading, self._checking):
            if task is not None:
                task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        try:
            self.pipeline = await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
            self.failure = ""
            log.info("tokenizer loaded", extra={"wanted": self.wanted})
        except (ModelFilesMissing, BadModelFiles, OSError) as error:
            if self.failure != str(error):
                self.failure = str(error)
                log.warning("tokenizer not loaded, engines tokenise", extra={"wanted": self.wanted, "why": str(error)})
            self._load_after = time.monotonic() + RELOAD_AFTER_S
        finally:
            self._loading = None

    def _read(self) -> PromptPipeline:
        return PromptPipeline.load(find_model_files(*self.wanted, environ=self._environ))

    async def _check(self, encoder: CheckedEncoder) -> None:
        """The tokens made of late, held against the reference, beside whatever else runs: that holds no lock."""
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, encoder.check)
            if found is not None and self.pipeline is not None:
                self.pipeline.forget()
                self._metrics.encoder_differences.inc()
                log.error(
                    "the fast encoder was wrong and is used no more",
                    extra={"wanted": self.wanted, "chars": found.chars, "at_token": found.at_token},
                )
        finally:
            self._checking = None
