"""From a request to the token ids and block keys an engine will have for it.

request -> text (`messages`, `templates`) -> pieces (`special_tokens`) -> tokens and keys (`prefixes`). Source for how
the parts are put together: vLLM 0.32 renderers/{online_renderer,base,params}.py and `build_chat_params` of
entrypoints/openai/chat_completion/protocol.py.

Synchronous, and not for several threads at once. A prompt with parts that are no text (images, ...) is known up to the
first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import Keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.prompts.errors import ModelFilesMissing, PromptError
from kvatlas_common.prompts.messages import ContentFormat, conversation, tool_schemas, without_developer
from kvatlas_common.prompts.model_files import ModelFiles
from kvatlas_common.prompts.prefixes import Piece, PrefixCache, Segment, chunks
from kvatlas_common.prompts.requests import (
    ChatPrompt,
    PromptRequest,
    TextPrompt,
    TokenIds,
    TokenPrompt,
    Truncation,
    token_array,
)
from kvatlas_common.prompts.template_files import ChatTemplates
from kvatlas_common.prompts.templates import Clock
from kvatlas_common.prompts.tokenizers import TextTokenizer

CACHE_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class EngineRendering:
    """What engines were started with that changes their prompts and cannot be seen from outside.

    `--chat-template` (its text), `--chat-template-content-format` (None: auto), `--default-chat-template-kwargs`.
    """

    chat_template: str | None = None
    content_format: ContentFormat | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class TokenizedPrompt:
    """The token ids of a prompt, as far as they are known.

    `complete`: all of them; otherwise `n_tokens` counts those before the first part that is not text. `reused_tokens`:
    how many of them had been tokenised before. `path` is empty for ids that came as ids.
    """

    __slots__ = ("_ids", "complete", "n_tokens", "path", "reused_tokens")

    def __init__(
        self, ids: TokenIds | None, path: tuple[Segment, ...] = (), complete: bool = True, reused_tokens: int = 0
    ) -> None:
        self._ids = ids
        self.path = path
        self.complete = complete
        self.reused_tokens = reused_tokens
        self.n_tokens = len(ids) if ids is not None else path[-1].end if path else 0

    @property
    def token_ids(self) -> TokenIds:
        """uint32[n_tokens]"""
        if self._ids is None:
            self._ids = np.concatenate([s.ids for s in self.path]) if self.path else np.empty(0, np.uint32)
        return self._ids

    def cacheable_blocks(self, block_size: int) -> int:
        """Whole blocks an engine may serve from its cache: it always computes the last token of a prompt."""
        return max(self.n_tokens - 1 if self.complete else self.n_tokens, 0) // block_size


def from_token_ids(ids: Sequence[int] | TokenIds) -> TokenizedPrompt:
    """A complete prompt that is given as token ids, or was tokenised elsewhere. Raises `PromptError`."""
    array = token_array(ids)
    if array is None:
        raise PromptError("token ids are not integers within 0..2^32-1")
    return TokenizedPrompt(array)


class PromptPipeline:
    """Everything needed to turn requests for one model into tokens and keys."""

    def __init__(
        self, tokenizer: TextTokenizer, templates: ChatTemplates, prefixes: PrefixCache, engines: EngineRendering
    ) -> None:
        self.tokenizer = tokenizer
        self.templates = templates
        self.prefixes = prefixes
        self._engines = engines

    @classmethod
    def load(
        cls,
        files: ModelFiles | Path,
        *,
        cache_bytes_max: int = CACHE_BYTES_MAX,
        now: Clock = datetime.now,
        engines: EngineRendering = EngineRendering(),
    ) -> PromptPipeline:
        """Raises `ModelFilesMissing`, `BadModelFiles`, and of those `BadTemplate`."""
        if isinstance(files, Path):
            files = ModelFiles(files)
        if not files.tokenizer.is_file():
            raise ModelFilesMissing([str(files.folder)], [files.folder])
        templates = ChatTemplates.load(files, now, engines.chat_template)
        return cls(TextTokenizer.load(files), templates, PrefixCache(cache_bytes_max), engines)

    def forget(self) -> None:
        """Reuse nothing of what was tokenised until now. In any thread."""
        self.prefixes = PrefixCache(self.prefixes.bytes_max)

    def tokenize(self, request: PromptRequest) -> TokenizedPrompt:
        """Raises `PromptError`: route the request without keys, or have an engine tokenise it."""
        match request:
            case TokenPrompt(token_ids=ids, truncation=truncation):
                return TokenizedPrompt(self._cut(ids, truncation))
            case TextPrompt(text=text):
                return self._tokenize(text, request.add_special_tokens, request.truncation)
            case ChatPrompt():
                text, known = self._render(request)
                return self._tokenize(text, request.add_special_tokens, request.truncation, known)

    def keys(self, prompt: TokenizedPrompt, profile: HashProfile, extras: PromptExtras) -> Keys:
        """uint64[n]: keys of the blocks that an engine may serve from its cache.

        Cut to floor((tokens - 1) / block size), or floor(tokens / block size) of an incomplete prompt. Raises
        `UnknownExtra` when the profile hashes a side of the adapter that is not known.
        """
        blocks, ids = prompt.cacheable_blocks(profile.block_size), prompt.token_ids
        path = prompt.path or self.prefixes.follow(chunks(ids), self.tokenizer.encoder.encode)[0]
        return self.prefixes.keys(path, ids, profile, extras)[:blocks]

    def _render(self, request: ChatPrompt) -> tuple[str, int | None]:
        """The prompt's text, and how many of its characters are known (None: all)."""
        tools, documents, kwargs = self._template_kwargs(request)
        template = self.templates.choose(with_tools=tools is not None)
        content_format = self._engines.content_format or template.content_format
        made = conversation(request.messages, content_format, request.renames_reasoning)
        texts = [
            template.render(
                messages if template.knows_developer else without_developer(messages),
                tools=tools,
                documents=documents,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                special_tokens=self.tokenizer.names,
                kwargs=kwargs,
            )
            for messages in (made.messages, made.second)
            if messages is not None
        ]
        return texts[0], None if made.second is None else _common_length(*texts)

    def _template_kwargs(self, request: ChatPrompt) -> tuple[Any, Any, dict[str, Any]]:
        """Tools, documents, and all else the template may see; a request's own names win over engines' defaults."""
        asked = dict(request.template_kwargs)
        if request.reasoning_effort is not None:
            asked.setdefault("enable_thinking", request.reasoning_effort != "none")
            asked["reasoning_effort"] = request.reasoning_effort
        if request.documents is not None:
            asked["documents"] = request.documents
        schemas = tool_schemas(request.tools)
        merged = {**self._engines.template_kwargs, **({} if schemas is None else {"tools": schemas})}
        merged |= {name: value for name, value in asked.items() if value is not None and value != "auto"}
        for name in ("add_generation_prompt", "continue_final_message"):
            merged.pop(name, None)  # those of the request itself count
        tools, documents = merged.pop("tools", None), merged.pop("documents", None)
        for listed in (tools, documents):
            if listed is not None and not (isinstance(listed, list) and all(isinstance(x, Mapping) for x in listed)):
                raise PromptError("tools or documents that are not a list of objects")
        return tools, documents, merged

    def _tokenize(
        self, text: str, add_special_tokens: bool, truncation: Truncation | None, known: int | None = None
    ) -> TokenizedPrompt:
        tokenizer, complete = self.tokenizer, known is None
        if known is not None:
            if truncation is not None:
                raise PromptError("truncation of a prompt that is not all text")
            text = text[: tokenizer.special.stable_length(text, known)]
        pieces: list[Piece] = list(tokenizer.special.pieces(text))
        front, back = (tokenizer.front, tokenizer.back) if add_special_tokens else (_NO_IDS, _NO_IDS)
        if front.size:
            pieces.insert(0, front.tobytes())
        if back.size and complete:
            pieces.append(back.tobytes())
        path, reused = self.prefixes.follow(pieces, tokenizer.encoder.encode)
        prompt = TokenizedPrompt(None, path, complete, reused)
        if truncation is None or prompt.n_tokens <= truncation.tokens:
            return prompt
        if truncation.side is not None:
            return TokenizedPrompt(self._cut(prompt.token_ids, truncation))
        kept = truncation.tokens - len(front) - len(back)  # special tokens stay, the text gives way
        if kept < 0:
            raise PromptError("truncation to fewer tokens than the special ones")
        inner = prompt.token_ids[len(front) : prompt.n_tokens - len(back)]
        return TokenizedPrompt(np.concatenate((front, self._cut(inner, Truncation(kept)), back)))

    def _cut(self, ids: TokenIds, truncation: Truncation | None) -> TokenIds:
        if truncation is None or len(ids) <= truncation.tokens:
            return ids
        side = truncation.side or self.tokenizer.truncation_side
        return ids[len(ids) - truncation.tokens :] if side == "left" else ids[: truncation.tokens]


_NO_IDS: TokenIds = np.empty(0, np.uint32)


def _common_length(one: str, other: str) -> int:
    """Length of the longest common prefix, in characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
