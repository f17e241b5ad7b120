"""How requests for a model are routed: a chain of policies, and which engines they are for.

The first policy that has an answer wins. A chain always ends with the least loaded engine, which has one whenever there
is an engine at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvatlas_router.core.policies import Needs, Policy, PolicyName, policy

FALLBACKS = {
    PolicyName.PRECISE: (PolicyName.ESTIMATE, PolicyName.SESSION),
    PolicyName.ESTIMATE: (PolicyName.SESSION,),
    PolicyName.CONSISTENT_HASH: (PolicyName.SESSION,),
}
"""What follows a policy where nothing else is asked for."""

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """`policies` in the order in which they are asked. `labels`: only engines that have all of them."""

    policies: tuple[Policy, ...]
    labels: Labels = ()

    @classmethod
    def of(
        cls,
        name: PolicyName,
        fallback: Sequence[PolicyName] | None = None,
        *,
        temperature_ms: float = 0.0,
        labels: Labels = (),
    ) -> Plan:
        rest = FALLBACKS.get(name, ()) if fallback is None else tuple(fallback)
        chain = dict.fromkeys((name, *rest, PolicyName.LEAST_LOAD))
        return cls(tuple(policy(each, temperature_ms=temperature_ms) for each in chain), labels)

    @property
    def needs_prompt(self) -> bool:
        """Whether prompts have to be tokenised."""
        return any(each.needs is not Needs.NOTHING for each in self.policies)


@dataclass(frozen=True, slots=True)
class Plans:
    """`by_model`: for models and adapters that have a plan of their own."""

    default: Plan
    by_model: Mapping[str, Plan] = field(default_factory=dict)

    def of(self, model: str) -> Plan:
        return self.by_model.get(model, self.default)

    @property
    def need_prompts(self) -> bool:
        return any(plan.needs_prompt for plan in (self.default, *self.by_model.values()))
