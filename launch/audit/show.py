"""Findings as text for a terminal, as JSON for programs, and as a page."""

import shutil
import textwrap
from pathlib import Path
from typing import Any

from launch.audit.account import Account
from launch.audit.finding import RULES, Finding, Groups, Severity


def as_text(account: Account, groups: Groups) -> str:
    """Return each rule with its reason, and below it the findings and their remedies."""
    width = min(shutil.get_terminal_size((120, 40)).columns, 150)
    lines = [headline(account, groups), ""]
    for rule, findings in groups:
        title = f"{str(rule.severity).upper():8}  {rule.name}: {rule.why}"
        lines += textwrap.wrap(title, width, subsequent_indent=" " * 10)
        for finding in findings:
            lines += textwrap.wrap(
                finding.what + _cost(finding),
                width,
                initial_indent=" " * 10 + "- ",
                subsequent_indent=" " * 12,
            )
            # Commands are not wrapped, so that they can be copied.
            lines.append(" " * 12 + finding.change)
        lines.append("")
    lines += [f"not checked, since this user may not: {entry}" for entry in account.unread]
    if account.unread:
        lines.append("python -m launch audit --policy prints the policy that it needs")
    return "\n".join(lines).rstrip()


def as_json(account: Account, groups: Groups) -> dict[str, Any]:
    """Return the findings as plain data, with their number and what could not be read."""
    return {
        "account": account.id,
        "region": account.region,
        "time": account.now.isoformat(timespec="seconds"),
        "counts": _counts(groups),
        "idle_dollars_a_month": round(_dollars(groups), 2),
        "unread": account.unread,
        "findings": [
            {
                "rule": rule.name,
                "severity": str(rule.severity),
                "resource": finding.resource,
                "what": finding.what,
                "why": rule.why,
                "change": finding.change,
                "dollars_a_month": finding.dollars,
            }
            for rule, findings in groups
            for finding in findings
        ],
    }


def as_html(account: Account, groups: Groups) -> str:
    """Return the findings as one page, with every value escaped."""
    # imported here: slow, and only the page needs it
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        account=account,
        headline=headline(account, groups),
        groups=groups,
        looked=looked(account),
        rules=RULES,
    )


def headline(account: Account, groups: Groups) -> str:
    """Return the account, what was checked, and the number of findings."""
    counts = [f"{count} {level}" for level, count in _counts(groups).items() if count]
    dollars = _dollars(groups)
    idle = f"; ${dollars:,.0f} a month for what is idle" if dollars else ""
    summary = ", ".join(counts) or "nothing found"
    return f"account {account.id} in {account.region}: {summary}{idle} ({looked(account)})"


def looked(account: Account) -> str:
    """Return how many resources of each kind were checked."""
    numbers = {
        ("identity", "identities"): len(account.identities),
        ("notebook", "notebooks"): len(account.notebooks),
        ("endpoint", "endpoints"): len(account.endpoints),
        ("function", "functions"): len(account.functions),
        ("instance", "instances"): len(account.instances),
    }
    parts = [f"{number} {names[number != 1]}" for names, number in numbers.items()]
    return "looked at " + ", ".join(parts)


def _counts(groups: Groups) -> dict[str, int]:
    counts = {str(level): 0 for level in reversed(Severity)}
    for rule, findings in groups:
        counts[str(rule.severity)] += len(findings)
    return counts


def _dollars(groups: Groups) -> float:
    return sum(finding.dollars or 0.0 for _, findings in groups for finding in findings)


def _cost(finding: Finding) -> str:
    return "" if finding.dollars is None else f": ${finding.dollars:,.2f} a month"
