"""Which chat template of a model's files is used for a request.

Files (`chat_template.jinja`, `additional_chat_templates/<name>.jinja`) win over `tokenizer_config.json`, whose
`chat_template` is one template or a list of named ones; with tools, one named `tool_use` wins over `default`. Without
tools, a multimodal model's processor comes first, and may bring a template of its own in `chat_template.json`. Some
models are not rendered by a template at all. Source: transformers 5.19 tokenization_utils_base.py, vLLM 0.32
renderers/hf.py (`resolve_chat_template`), config/model.py and tokenizers/registry.py (tokenizer modes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvatlas_common.prompts.errors import BadModelFiles, PromptError
from kvatlas_common.prompts.model_files import ModelFiles
from kvatlas_common.prompts.templates import ChatTemplate, Clock

_OTHERWISE_BY_ARCHITECTURE = frozenset(
    [
        "MoonshotKimiaForCausalLM",
        "KimiK3ForConditionalGeneration",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "DeepseekV4ForConditionalGeneration",
        "DeepseekV41ForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
        "GptOssForCausalLM",
    ]
)


class ChatTemplates:
    """The templates of one model, compiled."""

    def __init__(self, named: Mapping[str, ChatTemplate], processor: ChatTemplate | None, otherwise: str) -> None:
        self._named = dict(named)
        self._processor = processor
        self._otherwise = otherwise

    @classmethod
    def load(cls, files: ModelFiles, now: Clock, given: str | None = None) -> ChatTemplates:
        """`given`: the template the engines were told to use instead. Raises `BadTemplate`, `BadModelFiles`."""
        if given is not None:
            return cls({"default": ChatTemplate(given, now)}, None, _rendered_otherwise(files))
        sources = _from_files(files) or _from_config(files)
        named = {name: ChatTemplate(text, now, f"{files.folder}: {name}") for name, text in sources.items()}
        processor = files.settings("chat_template.json").get("chat_template") if _has_processor(files) else None
        own = ChatTemplate(processor, now, "chat_template.json") if isinstance(processor, str) else None
        return cls(named, None if "default" in _from_files(files) else own, _rendered_otherwise(files))

    @property
    def volatile(self) -> bool:
        """Some prompt may depend on the time it is rendered at."""
        return any(template.volatile for template in (*self._named.values(), self._processor) if template is not None)

    def choose(self, with_tools: bool) -> ChatTemplate:
        """Raises `PromptError` where this model's chats cannot be rendered here."""
        if self._otherwise:
            raise PromptError(self._otherwise)
        if self._processor is not None and not with_tools:
            return self._processor
        template = self._named.get("tool_use") if with_tools else None
        template = template or self._named.get("default")
        if template is None:
            raise PromptError("the model's files hold no chat template")
        return template


def _from_files(files: ModelFiles) -> dict[str, str]:
    texts = {"default": files.text("chat_template.jinja")}
    for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
        texts[path.stem] = files.text(f"additional_chat_templates/{path.name}")
    return {name: text for name, text in texts.items() if text is not None}


def _from_config(files: ModelFiles) -> dict[str, str]:
    match files.settings("tokenizer_config.json").get("chat_template"):
        case None:
            return {}
        case str() as text:
            return {"default": text}
        case [*entries] if all(isinstance(e, dict) and {"name", "template"} <= e.keys() for e in entries):
            return {str(e["name"]): str(e["template"]) for e in entries}
    raise BadModelFiles(f"{files.folder}/tokenizer_config.json: chat_template is neither text nor a list of named ones")


def _has_processor(files: ModelFiles) -> bool:
    return any((files.folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def _rendered_otherwise(files: ModelFiles) -> str:
    architectures: Any = files.settings("config.json").get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if name in _OTHERWISE_BY_ARCHITECTURE:
            return f"{name} is not rendered by a chat template"
    mistral = [*files.folder.glob("tekken.json"), *files.folder.glob("tokenizer.model.v*")]
    if mistral and any(files.folder.glob("consolidated*.safetensors")):
        return "a model in Mistral's own format is not rendered by a chat template"
    return ""
