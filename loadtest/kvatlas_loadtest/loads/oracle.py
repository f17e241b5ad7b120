"""What one infinite cache of the whole fleet would have served: the most any policy can hope for.

It knows everything that was asked before, wherever, as soon as it was asked; it forgets nothing. It keeps to the
engine's own rules: whole blocks only, and the last token of a prompt is always computed. In the order of the arrivals,
so that it does not depend on the policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas_loadtest.loads.naming import Named


def cached_tokens(named: Sequence[Named], output_tokens: Sequence[int], block_size: int) -> int:
    """Prompt tokens such a cache would have served over a whole load."""
    held: set[int] = set()
    served = 0
    for prompt, output in zip(named, output_tokens, strict=True):
        for key in prompt.lookup(block_size):
            if key not in held:
                break
            served += block_size
        computed = prompt.prompt_tokens + output - 1  # the last token sampled is never computed
        held.update(prompt.keys[: computed // block_size])
    return served
