"""What to call an engine's blocks: by the engine's own hashes if a router can compute them, else by hashes of our own.

An event carries token ids and the engine's hash of them, so the hash profile can be verified from a *root*: a store
with parent None on the gpu by a full-attention group. One root that fits proves a profile. One that does not fit proves
less:

| a root that fits nothing, where ...                         | means                                                |
|-------------------------------------------------------------|------------------------------------------------------|
| events name their extra keys (vLLM >= 0.22)                 | the hashes cannot be reproduced: *recompute*         |
| they do not, and no profile is configured                   | the same, until a later root proves a profile        |
| they do not, and a profile is configured                    | perhaps a salted request: wait for more roots        |
| an adapter is used whose name or path is not known          | nothing                                              |

*Recomputing* an engine: each block is hashed again from its token ids with a profile of ours, and its own hash is kept
beside (`_names`) to know what a removal means. Should a later root prove a profile after all, everything is renamed
back, unless there is too much of it by then: recomputed keys are as exact.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from kvatlas_common.blocks.discover import RootBlock, discover, refine, reproduces
from kvatlas_common.blocks.extras import UnknownExtra, event_extra
from kvatlas_common.blocks.keys import block_state, key_of, root_state
from kvatlas_common.blocks.profile import ExtraKeys, HashProfile, recomputed
from kvatlas_common.events.types import BlockRemoved, BlockStored, Event, MalformedBatch
from kvatlas_common.findings import Code, Finding
from kvatlas_common.findings.hashing import Hashing, hash_findings
from kvatlas_common.fleet import Adapter
from kvatlas_common.words import Medium
from kvatlas_indexer.core.expected import Expected
from kvatlas_indexer.core.match import GroupRule, Kind

__all__ = ["Expected", "Mode", "Naming"]

UNPROVEN_ROOTS_MAX = 8
"""Roots without extra keys that may fail a configured profile before it is given up."""
FULL_SEARCHES_MAX = 8
"""Roots on which every known seed is tried; later ones are held against configured and fleet profiles only."""
SEARCH_TOKENS_MAX = 4096
"""Blocks of more tokens are too dear to try every seed on. vLLM's largest are those of hybrid models, about 2,000."""
RENAMES_MAX = 65_536
"""Names up to which an engine is renamed back to its own hashes: it is done at once, at a few us each."""
NAMES_MAX = 8_000_000
"""Names kept of one engine; blocks beyond cannot be named, and lookups do not find them."""
DROPPED_NAMES_MAX = 65_536
"""Names kept of blocks no longer held: an offload tier may store one just after the gpu has evicted it."""


class Mode(Enum):
    OWN = "the engine's own hashes"
    RECOMPUTE = "hashes of ours"


@dataclass(slots=True)
class _Name:
    state: bytes  # our hash; the key is its low 64 bits
    copies: int  # how many times the engine holds the block, over all groups and media


class Naming:
    """One engine's naming. `adapters`: those it serves; `others`: the profiles verified in the fleet."""

    def __init__(
        self,
        expected: Expected | None = None,
        *,
        may_reproduce: bool = True,
        adapters: Callable[[], Sequence[Adapter]] = tuple,
        others: Callable[[], Iterable[HashProfile]] = tuple,
    ) -> None:
        self.mode = Mode.OWN if may_reproduce else Mode.RECOMPUTE
        self.profile: HashProfile | None = None
        self.verified = False
        self.block_size: int | None = None
        self.unnamed = 0  # blocks no lookup can find because their chain is not known
        self.blind_to_extras = False  # recomputing, and the events do not say which requests were salted
        self._expected = expected or Expected()
        self._may_reproduce = may_reproduce
        self._adapters = adapters
        self._others = others
        self.extras_proven = False
        self._roots_failed = 0
        self._suspicion = 0  # roots that may fail a proven profile before it is given up; 0: there is no reason to look
        self._searched: Counter[bool] = Counter()  # full searches done, on roots that are (not) evidence
        self._told: set[Code] = set()  # findings reported in this epoch
        self._names: dict[int, _Name] = {}
        self._dropped: OrderedDict[int, bytes] = OrderedDict()

    # -- before a message is applied -----------------------------------------------------------------------------------

    def study(
        self, events: Sequence[Event], rules: dict[int, GroupRule]
    ) -> tuple[list[Finding], list[tuple[int, int]]]:
        """Learns from a message before it is applied: the profile, and in recompute mode the names of its blocks.

        Returns findings, and (old, new) pairs of keys to be renamed because a profile has been proven after all.
        """
        findings: list[Finding] = []
        renamed: list[tuple[int, int]] = []
        for event in events:
            if not isinstance(event, BlockStored):
                continue
            try:
                wanted = event.medium is Medium.GPU and self._wants(event)
                if not (wanted or self.mode is Mode.RECOMPUTE) or not _tells(event, rules):
                    continue
                if wanted:
                    root = self._root(event)
                    findings += self._judge(root, event.says_extra_keys)
                    if self.verified and self.mode is Mode.RECOMPUTE:
                        renamed += self._back_to_own()
                if self.mode is Mode.RECOMPUTE:
                    self._name(event)
            except (MalformedBatch, UnknownExtra) as unusable:
                findings.append(Finding(Code.UNUSABLE_EVENT, str(unusable)))
        return findings, renamed

    def _wants(self, event: BlockStored) -> bool:
        """Only a root tells, and only while something is not proven: token ids are dear to decode."""
        if event.parent is not None or not self._may_reproduce:
            return False
        if not self.verified:
            return len(self._names) <= RENAMES_MAX
        if self._suspicion:
            return True
        return not self.extras_proven and (event.lora_id is not None or event.lora_name is not None or _salted(event))

    def _root(self, event: BlockStored) -> RootBlock:
        extras = event.extra_keys()
        adapter = self._adapter(event)
        return RootBlock(
            key=event.keys[0],
            tokens=event.token_ids()[: event.block_size],
            untagged=extras[0] if extras else None,
            lora_id=event.lora_id,
            lora_name=adapter.name or None,
            lora_path=adapter.path,
            full=event.full[0] if event.full else None,
        )

    def _adapter(self, event: BlockStored) -> Adapter:
        """The adapter of an event: its name is not in the event before vLLM 0.16, its path never."""
        if event.lora_name is None and event.lora_id is None:
            return Adapter("")
        for adapter in self._adapters():
            if adapter.name == event.lora_name or (event.lora_name is None and adapter.number == event.lora_id):
                return adapter
        return Adapter(event.lora_name or "", None, event.lora_id)

    def _judge(self, root: RootBlock, says_extra_keys: bool) -> list[Finding]:
        self.block_size = len(root.tokens)
        if self.verified and not self._is_refuted(root, says_extra_keys):
            return self._refine(root, says_extra_keys)
        candidates = [*self._expected.profiles(self.block_size), *self._others()]
        if self.profile is not None and self.mode is Mode.OWN:
            candidates.insert(0, replace(self.profile, block_size=self.block_size))
        found = next((profile for profile in candidates if reproduces(profile, root)), None) or self._search(root)
        if found is None:
            return self._unproven(root, says_extra_keys)
        self.extras_proven = bool(root.untagged) or _adapted(root)
        if not self.extras_proven and not says_extra_keys and found.extra_keys is ExtraKeys.TAGGED:
            found = replace(found, extra_keys=ExtraKeys.LORA_NAME)  # before 0.22, long before there were tags
        self.profile, self.verified = found, True
        return self._compare(found)

    def _is_refuted(self, root: RootBlock, says_extra_keys: bool) -> bool:
        """Whether a proven profile is one no longer: what was lost may have been a restart with other settings."""
        assert self.profile is not None
        if not self._suspicion or refine(self.profile, root) is not None:
            self._suspicion = 0
        elif _is_evidence(root):
            self._suspicion -= self._suspicion if says_extra_keys else 1
            if not self._suspicion:
                self._unlearn()
                return True
        return False

    def _search(self, root: RootBlock) -> HashProfile | None:
        """Tries every known seed; roots that are no evidence must not use up the searches of those that are."""
        if len(root.tokens) > SEARCH_TOKENS_MAX or self._searched[_is_evidence(root)] >= FULL_SEARCHES_MAX:
            return None
        self._searched[_is_evidence(root)] += 1
        return discover(root, (), [self._expected.seed] if self._expected.seed else [])

    def _refine(self, root: RootBlock, says_extra_keys: bool) -> list[Finding]:
        assert self.profile is not None
        if (refined := refine(self.profile, root)) is not None:
            self.profile, self.extras_proven = refined, True
            return []
        if not (says_extra_keys and _is_evidence(root)):
            return []
        return self._once([Finding(Code.EXTRA_KEYS_NOT_REPRODUCIBLE, _EXTRAS_LOST, _EXTRAS_CAUSE, _EXTRAS_CHANGE)])

    def _unproven(self, root: RootBlock, says_extra_keys: bool) -> list[Finding]:
        if not _is_evidence(root):
            return []
        self._roots_failed += 1
        configured = self._expected.profiles(len(root.tokens))
        waiting = not says_extra_keys and self._roots_failed < UNPROVEN_ROOTS_MAX
        if configured and waiting:
            self.profile = next((c for c in configured if c.extra_keys is not ExtraKeys.TAGGED), configured[0])
            return []
        self._recompute(len(root.tokens), blind=not says_extra_keys)
        if waiting:
            return []
        does = Hashing(block_size=len(root.tokens))
        return self._once(hash_findings(does, configured=self._expected.hashing, reproducible=False))

    def _compare(self, found: HashProfile) -> list[Finding]:
        """Is what the engine does what the configuration says? What it leaves open cannot be wrong."""
        return hash_findings(Hashing.of(found), configured=self._expected.hashing)

    def _once(self, findings: Sequence[Finding]) -> list[Finding]:
        new = [finding for finding in findings if finding.code not in self._told]
        self._told.update(finding.code for finding in new)
        return new

    # -- while it is applied -------------------------------------------------------------------------------------------

    def stored(self, event: BlockStored) -> Sequence[int]:
        """The keys of blocks now held.

        In recompute mode, blocks whose chain is not known keep the engine's own hash: no lookup finds them, and they
        are counted; but should a profile be proven later, they are where they belong.
        """
        if self.mode is Mode.OWN:
            return event.keys
        keys: list[int] = []
        for own in event.keys:
            name = self._names.get(own)
            if name is None:
                state = self._dropped.pop(own, None)
                if state is None:
                    self.unnamed += 1
                    keys.append(own)
                    continue
                name = self._names[own] = _Name(state, 0)
            name.copies += 1
            keys.append(key_of(name.state))
        return keys

    def key_before(self, event: BlockStored) -> int | None:
        """Of the block that those of the event follow, if there is one and its name is known."""
        if self.mode is Mode.OWN or event.parent is None:
            return event.parent
        name = self._names.get(event.parent)
        return key_of(name.state) if name else None

    def removed(self, event: BlockRemoved) -> Sequence[int]:
        if self.mode is Mode.OWN:
            return event.keys
        keys: list[int] = []
        for own in event.keys:
            name = self._names.get(own)
            if name is None:
                keys.append(own)
                continue
            keys.append(key_of(name.state))
            name.copies -= 1
            if name.copies <= 0:
                del self._names[own]
                self._dropped[own] = name.state
                if len(self._dropped) > DROPPED_NAMES_MAX:
                    self._dropped.popitem(last=False)
        return keys

    @property
    def reproduces(self) -> bool:
        """Whether its blocks go by its own hashes, so that nothing but those is needed to go on with it."""
        return self.mode is Mode.OWN

    def resume(self, profile: HashProfile | None, verified: bool, extras_proven: bool, block_size: int | None) -> None:
        """Goes on where another owner of the engine stood."""
        self.profile, self.verified, self.extras_proven, self.block_size = profile, verified, extras_proven, block_size

    def begin_epoch(self) -> None:
        """The engine may have come back with other settings: its profile is to be proven again."""
        self._unlearn()
        self.block_size, self._suspicion = None, 0

    def lose_track(self) -> None:
        """Messages were lost: if that was a restart, the next roots will tell."""
        self._suspicion = UNPROVEN_ROOTS_MAX if self.verified else 0

    def _unlearn(self) -> None:
        self.verified = self.extras_proven = False
        self._roots_failed = 0
        self._searched.clear()
        self._told.clear()

    def learn_block_size(self, size: int) -> None:
        """From a store that is no root: it proves nothing, but a profile yet to be proven has that size."""
        self.block_size = size
        if self.profile is not None and not self.verified and self.profile.block_size != size:
            self.profile = replace(self.profile, block_size=size)

    def forget_names(self) -> dict[int, Any]:
        """Nothing of what was named is held any more. Returns what that leaves to be freed."""
        names, self._names, self.unnamed = self._names, {}, 0
        self._dropped = OrderedDict()
        return names

    # -- recomputing ---------------------------------------------------------------------------------------------------

    def _recompute(self, block_size: int, *, blind: bool) -> None:
        self.mode, self.blind_to_extras = Mode.RECOMPUTE, blind
        self.profile, self.verified = recomputed(block_size), False

    def _name(self, event: BlockStored) -> None:
        """Hashes the blocks of a store anew, if its parent is known."""
        size, profile = event.block_size, recomputed(event.block_size)
        if self.block_size is None or self.profile is None:
            self._recompute(size, blind=not event.says_extra_keys)
            self.block_size = size
        if event.parent is None:
            state = root_state(profile)
        elif (parent := self._names.get(event.parent)) is not None:
            state = parent.state
        elif event.parent in self._dropped:
            state = self._dropped[event.parent]
        else:
            return
        tokens, extras, adapter = event.token_ids(), event.extra_keys(), self._adapter(event)
        for i, own in enumerate(event.keys):
            untagged = extras[i] if extras and i < len(extras) else None
            extra = event_extra(profile.extra_keys, untagged, event.lora_id, adapter.name or None, None)
            state = block_state(profile, state, tokens[i * size : (i + 1) * size], extra)
            if own not in self._names and len(self._names) < NAMES_MAX:
                self._names[own] = _Name(state, 0)

    def _back_to_own(self) -> list[tuple[int, int]]:
        """(our key, own hash) of all that is held.

        What salted and unsalted requests share in our keys alone cannot be told apart any more: it stays where no
        lookup finds it, and is counted.
        """
        held = [(key_of(name.state), own) for own, name in self._names.items() if name.copies > 0]
        shared = Counter(key for key, _ in held)
        self.mode, self.blind_to_extras = Mode.OWN, False
        self.forget_names()
        self.unnamed = sum(1 for key, _ in held if shared[key] > 1)
        return [(key, own) for key, own in held if shared[key] == 1]


_EXTRAS_LOST = "its hashes of prompts with a salt, an adapter or media cannot be reproduced: lookups do not find them"
_EXTRAS_CAUSE = "a version of vLLM that puts something into its hashes that is not known here"
_EXTRAS_CHANGE = "run the indexer with --recompute-keys; plain prompts are found as they are"


def _adapted(root: RootBlock) -> bool:
    return root.lora_id is not None or root.lora_name is not None


def _is_evidence(root: RootBlock) -> bool:
    """Whether all that may be in its hash is known: an adapter's name or path may be missing."""
    return not _adapted(root) or (root.lora_name is not None and root.lora_path is not None)


def _tells(event: BlockStored, rules: dict[int, GroupRule]) -> bool:
    """Whether its token ids and hashes belong together, block by block, and parent None means the prompt's start."""
    if not event.keys or event.block_size == 0:
        return False
    if event.token_count != len(event.keys) * event.block_size:
        return False
    if GroupRule.is_full(event.kind):
        return True
    return not any(rule.kind is Kind.FULL for rule in rules.values())


def _salted(event: BlockStored) -> bool:
    if event.is_plain:
        return False
    extras = event.extra_keys()
    return bool(extras and extras[0])
