"""Whether the tokens made here are the tokens an engine makes.

A wrong template or tokenizer costs every cache hit and shows nowhere. So on meeting an engine a few conversations are
tokenised by both. They are chosen to differ where templates differ: system messages, several turns, lists of parts,
what is trimmed, text beyond ASCII, a plain prompt with the special tokens around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvatlas_common.findings import Code, Finding

_TURNS: list[Mapping[str, Any]] = [
    {"role": "user", "content": "  Name a colour, please. "},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Größe? 多少 \U0001f30d 3.14159\n\tEnd"},
]

SAMPLES: Sequence[Mapping[str, Any]] = (
    {"messages": _TURNS[:1]},
    {"messages": [{"role": "system", "content": "You answer in one word."}, *_TURNS]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}]},
    {"messages": _TURNS[:2], "add_generation_prompt": False, "continue_final_message": True},
    {"prompt": "Once upon a time, naïve 東京"},
)


def difference(sample: int, local: Sequence[int] | None, remote: Sequence[int] | None) -> str | None:
    """What is wrong, None if nothing; None tokens: that side refused the sample. Says numbers, never text."""
    if local is None or remote is None:
        if local is remote:
            return None
        return f"sample {sample}: refused {'here' if local is None else 'by the engine'}, tokenised by the other"
    if list(local) == list(remote):
        return None
    at = next((i for i, (a, b) in enumerate(zip(local, remote, strict=False)) if a != b), min(len(local), len(remote)))
    return f"sample {sample}: {len(local)} tokens here, {len(remote)} at the engine, the first difference at {at}"


def judge(model: str, root: str | None, differences: Sequence[str | None]) -> Finding | None:
    """What differs, given the difference of each sample: where plain prompts agree, only the template is another."""
    first = next((found for found in differences if found is not None), None)
    if first is None:
        return None
    wrong = f"its tokens differ from those made here, so it tokenises all prompts for {model} ({first})"
    plain = [found for sample, found in zip(SAMPLES, differences, strict=True) if "prompt" in sample]
    files = f"--model-files {model}=<folder> for the router must name the files it serves ({root or 'not said'})"
    if any(found is not None for found in plain):
        cause = "its tokenizer files are not those that are used here"
        return Finding(Code.TOKENIZER_DIFFERS, wrong, cause, files)
    cause = "it was started with another chat template (--chat-template, or changed files); plain prompts agree"
    change = f"start it with the --chat-template of the others and of the model's files; or {files}, with that template"
    return Finding(Code.TEMPLATE_DIFFERS, wrong, cause, change)
