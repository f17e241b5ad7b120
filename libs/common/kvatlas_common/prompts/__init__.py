"""A request's prompt, exactly as an engine will have it: body -> text -> tokens -> block keys.

`understand` reads a body, `PromptPipeline` (one per model) does the rest; `find_model_files` finds what it needs. What
is exact here is exact for vLLM 0.32; each module names the sources it follows.
"""

from kvatlas_common.prompts.errors import BadModelFiles, BadTemplate, ModelFilesMissing, PromptError
from kvatlas_common.prompts.messages import ContentFormat
from kvatlas_common.prompts.model_files import ModelFiles, find_model_files
from kvatlas_common.prompts.prompt import EngineRendering, PromptPipeline, TokenizedPrompt, from_token_ids
from kvatlas_common.prompts.requests import (
    ChatPrompt,
    Facts,
    PromptRequest,
    TextPrompt,
    TokenPrompt,
    Unrenderable,
    understand,
)

__all__ = [
    "BadModelFiles",
    "BadTemplate",
    "ChatPrompt",
    "ContentFormat",
    "EngineRendering",
    "Facts",
    "ModelFiles",
    "ModelFilesMissing",
    "PromptError",
    "PromptPipeline",
    "PromptRequest",
    "TextPrompt",
    "TokenPrompt",
    "TokenizedPrompt",
    "Unrenderable",
    "find_model_files",
    "from_token_ids",
    "understand",
]
