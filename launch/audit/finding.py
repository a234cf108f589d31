"""A finding, and the rules that make findings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from launch.audit.account import Account


class Severity(IntEnum):
    """As AWS Security Hub grades its controls: critical is open to anyone now, high one mistake away, medium weak or wasteful, low good practice."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Found:
    """One resource that breaks a rule."""

    resource: str  # an ARN, or "bucket NAME" where people know it by name
    what: str  # what is wrong with this one
    change: str  # the command, or the settings, that mend it
    dollars: float | None = None  # what it costs a month, where it costs


@dataclass(frozen=True)
class Rule:
    name: str
    severity: Severity
    why: str  # why it matters
    look: Callable[[Account], Iterator[Found]]


@dataclass(frozen=True)
class Finding:
    rule: str
    severity: Severity
    why: str
    found: Found


RULES: dict[str, Rule] = {}


def rule(
    name: str, severity: Severity, why: str
) -> Callable[[Callable[[Account], Iterator[Found]]], Callable[[Account], Iterator[Found]]]:
    """Registers a function that looks for one kind of fault."""

    def register(
        look: Callable[[Account], Iterator[Found]],
    ) -> Callable[[Account], Iterator[Found]]:
        assert name not in RULES
        RULES[name] = Rule(name, severity, why, look)
        return look

    return register


def judge(account: Account) -> list[Finding]:
    """Everything that the rules find, the worst first."""
    findings = [
        Finding(entry.name, entry.severity, entry.why, found)
        for entry in RULES.values()
        for found in entry.look(account)
    ]
    return sorted(
        findings, key=lambda finding: (-finding.severity, finding.rule, finding.found.resource)
    )
