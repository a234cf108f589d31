"""A finding, and the rules that make findings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from launch.audit.account import Account


class Severity(IntEnum):
    """The severity of a finding, graded as in AWS Security Hub.

    critical: open to anyone now; high: one mistake away from that; medium: weak or wasteful; low:
    against good practice.
    """

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """One resource that breaks a rule."""

    resource: str  # an ARN
    what: str  # what is wrong with this one
    change: str  # the command, or the settings, that fix it
    dollars: float | None = None  # dollars a month, if it costs money


Check = Callable[[Account], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    name: str
    severity: Severity
    why: str  # why it matters
    check: Check


Groups = list[tuple[Rule, list[Finding]]]
RULES: dict[str, Rule] = {}


def rule(name: str, severity: Severity, why: str) -> Callable[[Check], Check]:
    """Register a function that looks for one kind of fault."""

    def register(check: Check) -> Check:
        assert name not in RULES
        RULES[name] = Rule(name, severity, why, check)
        return check

    return register


def judge(account: Account) -> Groups:
    """Return each broken rule with its findings, the worst rule first."""
    groups = []
    for each in sorted(RULES.values(), key=lambda each: (-each.severity, each.name)):
        findings = sorted(each.check(account), key=lambda finding: finding.resource)
        if findings:
            groups.append((each, findings))
    return groups
