"""What can go wrong between a request body and its tokens, and whose fault it is.

None of these may fail a user's request: the caller falls back (another way to tokenise, or routing without keys) and
names the reason. No message holds prompt text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class PromptError(ValueError):
    """This request cannot be rendered or tokenised here: malformed, refused by its template, or of an unknown shape."""


class ModelFilesMissing(Exception):
    """The files of a model are not on this machine. `looked` lists the places, the message also the cure."""

    def __init__(self, wanted: Sequence[str], looked: Sequence[Path]) -> None:
        self.wanted = tuple(wanted)
        self.looked = tuple(looked)
        places = ", ".join(map(str, self.looked)) or "nowhere"
        super().__init__(
            f"no tokenizer.json for {' or '.join(map(repr, self.wanted)) or 'an unnamed model'} (looked in: {places}); "
            "give the folder that holds the model's tokenizer.json, or fill the hub cache (HF_HOME) on this machine"
        )


class BadModelFiles(Exception):
    """The files of a model are there but cannot be used; the message names the file and what is wrong with it."""


class BadTemplate(BadModelFiles):
    """The model's chat template does not compile."""
