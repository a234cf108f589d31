"""`python -m launch audit`: what is too powerful or idle in the account's machine-learning work.

Each finding comes with the change that mends it. It reads settings and changes nothing; the
policy that it needs is printed by --policy.
"""

import argparse
import json
from collections.abc import Sequence

# identities and money register their rules
from launch.audit import identities, money, policies, show  # noqa: F401
from launch.audit.account import needed_policy, read
from launch.audit.finding import Severity, judge
from launch.targets.spec import aws_of, split_overrides
from trainer.common import files
from trainer.common.arguments import positive, typed_path
from trainer.common.console import log
from trainer.common.errors import OK, UserError

FOUND = 3  # exit code: there are findings at or above --fail-on, or something could not be read


def main(argv: Sequence[str]) -> int:
    """Audit the account; return OK, or FOUND."""
    parser = argparse.ArgumentParser(
        prog="python -m launch audit",
        description="Finds what is too powerful or idle. Reads settings; changes nothing.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="target.KEY=VALUE",
        help="target.region=REGION, where it is not the usual one",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="the whole account, not only what belongs to machine learning",
    )
    parser.add_argument(
        "--idle-days",
        type=positive,
        default=3,
        metavar="N",
        help="call idle what did nothing for so many days (default: 3)",
    )
    parser.add_argument(
        "--fail-on",
        choices=[str(level) for level in Severity],
        default="medium",
        help=f"findings from here on end with exit code {FOUND}",
    )
    parser.add_argument(
        "--json", action="store_true", help="the findings as JSON on standard output"
    )
    parser.add_argument(
        "--html", type=typed_path, metavar="FILE", help="also write them as one HTML page"
    )
    parser.add_argument(
        "--policy",
        action="store_true",
        help="print the policy that the audit itself needs, and call nothing",
    )
    options = parser.parse_args(argv)
    if options.policy:
        print(json.dumps(needed_policy(), indent=2))
        return OK
    ours, others = split_overrides(options.overrides)
    if others:
        raise UserError(
            f"audit {others[0]}: a job's settings have no meaning here; "
            "allowed: target.region=REGION and the options that --help lists"
        )
    policies.load_rule_sets()
    account = read(aws_of(ours), options.idle_days, options.all)
    groups = judge(account)
    if options.json:
        print(json.dumps(show.as_json(account, groups), indent=2))
    else:
        print(show.as_text(account, groups))
    if options.html:
        files.write(options.html, show.as_html(account, groups))
        if not options.json:
            log.info("report %s", options.html)
    failing = Severity[options.fail_on.upper()]
    fails = any(rule.severity >= failing for rule, _ in groups)
    if account.unread or fails:
        return FOUND
    return OK
