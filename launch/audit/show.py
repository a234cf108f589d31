"""Findings as text for a terminal, as JSON for programs, and as a page."""

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.audit.account import Account
from launch.audit.finding import RULES, Finding, Severity


def as_text(account: Account, findings: Sequence[Finding]) -> str:
    """Each rule once, with why it matters; below it what breaks it, and the change."""
    width = min(shutil.get_terminal_size((120, 40)).columns, 150)
    lines = [headline(account, findings), ""]
    for group in _by_rule(findings):
        lines += textwrap.wrap(
            f"{str(group[0].severity).upper():8}  {group[0].rule}: {group[0].why}",
            width,
            subsequent_indent=" " * 10,
        )
        for finding in group:
            lines += textwrap.wrap(
                finding.found.what + _cost(finding),
                width,
                initial_indent=" " * 10 + "- ",
                subsequent_indent=" " * 12,
            )
            # A command is not wrapped: it is there to be copied.
            lines.append(" " * 12 + finding.found.change)
        lines.append("")
    lines += [f"not seen, since this caller may not: {entry}" for entry in account.unread]
    if account.unread:
        lines.append("python -m launch audit --policy prints the policy that it needs")
    return "\n".join(lines).rstrip()


def as_json(account: Account, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "account": account.id,
        "region": account.region,
        "time": account.now.isoformat(timespec="seconds"),
        "counts": {
            str(level): sum(finding.severity == level for finding in findings)
            for level in reversed(Severity)
        },
        "idle_dollars_a_month": round(sum(finding.found.dollars or 0 for finding in findings), 2),
        "unread": account.unread,
        "findings": [
            {
                "rule": finding.rule,
                "severity": str(finding.severity),
                "resource": finding.found.resource,
                "what": finding.found.what,
                "why": finding.why,
                "change": finding.found.change,
                "dollars_a_month": finding.found.dollars,
            }
            for finding in findings
        ],
    }


def as_html(account: Account, findings: Sequence[Finding]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2")
    return page.render(
        account=account,
        headline=headline(account, findings),
        groups=_by_rule(findings),
        looked=looked(account),
        rules=RULES.values(),
    )


def headline(account: Account, findings: Sequence[Finding]) -> str:
    """The account, what was looked at, and how much was found."""
    counts = [
        f"{count} {level}"
        for level in reversed(Severity)
        if (count := sum(finding.severity == level for finding in findings))
    ]
    dollars = sum(finding.found.dollars or 0 for finding in findings)
    found = ", ".join(counts) or "nothing found"
    idle = f"; ${dollars:,.0f} a month for what is idle" if dollars else ""
    return f"account {account.id} in {account.region}: {found}{idle} ({looked(account)})"


def looked(account: Account) -> str:
    seen: dict[str, Sequence[Any]] = {
        "identity": account.identities,
        "bucket": account.buckets,
        "notebook": account.notebooks,
        "endpoint": account.endpoints,
        "function": account.functions,
        "instance": account.instances,
        "recent job": account.jobs,
    }
    plural = {"identity": "identities"}
    return "looked at " + ", ".join(
        f"{len(found)} {kind if len(found) == 1 else plural.get(kind, f'{kind}s')}"
        for kind, found in seen.items()
    )


def _by_rule(findings: Sequence[Finding]) -> list[list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.rule, []).append(finding)
    return list(groups.values())


def _cost(finding: Finding) -> str:
    return "" if finding.found.dollars is None else f": ${finding.found.dollars:,.2f} a month"
