"""Rules for roles, users and groups: full access, `*`, PassRole, and roles shared or unused."""

import json
import shlex
from collections.abc import Iterator

from launch.audit.account import Account, Identity, Policy
from launch.audit.finding import Finding, Severity, rule
from launch.audit.policies import (
    ROLE_OF_SERVICE,
    allowing,
    by_aws,
    can_be_narrowed,
    detach,
    narrow,
    own,
    put_narrowed,
    reads_settings,
    refused,
    whole_services,
)
from trainer.common.text import listed

EVERYTHING = ("AdministratorAccess", "PowerUserAccess", "IAMFullAccess")  # AWS's policies
UNUSED_DAYS = 90


@rule(
    "role/everything",
    Severity.CRITICAL,
    "Whoever gets hold of it, by a leaked key, a notebook or a poisoned package, owns the account.",
)
def everything(account: Account) -> Iterator[Finding]:
    for identity, policy in by_aws(account):
        if policy.name in EVERYTHING:
            what = f"{identity.kind} {identity.name} has AWS's policy {policy.name}"
            yield Finding(identity.arn, what, detach(identity, policy))
    reported = set()
    for identity, policy, statement in allowing(account):
        reaches_all = statement.has_resource_wildcard and not statement.has_condition
        key = (identity.arn, policy.name)
        if reaches_all and "*" in statement.actions and key not in reported:
            reported.add(key)
            what = f"{_policy(identity, policy)} allows every action on everything"
            yield Finding(identity.arn, what, narrow(identity, policy))


@rule(
    "role/full-access",
    Severity.HIGH,
    "An attacker who gets a job or a notebook with it controls every resource of that service "
    "in the account, other teams' too.",
)
def full_access(account: Account) -> Iterator[Finding]:
    for identity, policy in by_aws(account):
        full = policy.name.endswith(("FullAccess", "FullAccessV2"))
        if full and policy.name not in EVERYTHING:
            what = f"{identity.kind} {identity.name} has AWS's policy {policy.name}"
            yield Finding(identity.arn, what, detach(identity, policy))


@rule(
    "role/wildcard-action",
    Severity.HIGH,
    "It also grants whatever the service adds later, and deleting and sharing, which no job needs.",
)
def wildcard_action(account: Account) -> Iterator[Finding]:
    for identity, policy, statement in allowing(account):
        services = [action for action in whole_services(statement) if action != "*"]
        if services:
            what = f"{_policy(identity, policy)} allows {', '.join(services)}"
            yield Finding(identity.arn, what, narrow(identity, policy))


@rule(
    "role/not-action",
    Severity.HIGH,
    "An Allow of everything but a list grants every action that the author did not think of.",
)
def not_action(account: Account) -> Iterator[Finding]:
    for identity, policy, statement in allowing(account):
        for key in ("NotAction", "NotResource"):
            if key in statement.statement:
                what = f"{_policy(identity, policy)} allows with {key}"
                yield Finding(identity.arn, what, narrow(identity, policy))


@rule(
    "role/wildcard-resource",
    Severity.HIGH,
    "This identity needs a few resources, and the statement reaches all of the account: "
    "other projects' models, data and functions too.",
)
def wildcard_resource(account: Account) -> Iterator[Finding]:
    for identity, policy, statement in allowing(account):
        if not can_be_narrowed(statement):
            continue
        # What only lists or reads settings gives away little; PassRole has a rule of its own.
        actions = [
            action
            for action in statement.restrictable_actions
            if action != "iam:PassRole" and not reads_settings(action)
        ]
        if actions:
            what = (
                f"{_policy(identity, policy)} allows {listed(sorted(actions), 6)} on every resource"
            )
            yield Finding(identity.arn, what, put_narrowed(account, identity, policy))


@rule(
    "role/pass-role",
    Severity.HIGH,
    "Whoever may pass any role to any service may start a machine with the account's strongest "
    "role and act as it.",
)
def pass_role(account: Account) -> Iterator[Finding]:
    for identity, policy, statement in allowing(account):
        if "iam:PassRole" not in statement.expanded_actions or "*" in statement.actions:
            continue
        faults = []
        if any(arn == "*" or arn.endswith(":role/*") for arn in statement.resources):
            faults.append("any role")
        tests = statement.statement.get("Condition", {}).values()
        if "iam:passedtoservice" not in {key.lower() for test in tests for key in test}:
            faults.append("to any service (no condition on iam:PassedToService)")
        if faults:
            what = f"{_policy(identity, policy)} may pass {', '.join(faults)}"
            yield Finding(identity.arn, what, _pass_one_role(account, identity, policy))


def _pass_one_role(account: Account, identity: Identity, policy: Policy) -> str:
    service = "sagemaker"
    if set(identity.services) & set(ROLE_OF_SERVICE):
        service = identity.services[0]
    statement = {
        "Effect": "Allow",
        "Action": "iam:PassRole",
        "Resource": f"arn:{account.partition}:iam::{account.id}:role/NAME_OF_THE_JOBS_ROLE",
        "Condition": {"StringEquals": {"iam:PassedToService": f"{service}.amazonaws.com"}},
    }
    if refused(account, {"Version": "2012-10-17", "Statement": [statement]}):
        return narrow(identity, policy)
    return f"replace the statement in policy {policy.name} by {json.dumps(statement)}"


@rule(
    "role/aws-warning",
    Severity.MEDIUM,
    "AWS's own check of policies (IAM Access Analyzer) calls it a risk.",
)
def aws_warning(account: Account) -> Iterator[Finding]:
    for identity, policy in own(account):
        for warning in account.aws_validates(json.dumps(policy.document, default=str)) or []:
            code = warning["issueCode"]
            # PassRole has a rule of its own.
            if warning["findingType"] == "SECURITY_WARNING" and not code.startswith("PASS_ROLE"):
                what = f"{_policy(identity, policy)}: {code}: {warning['findingDetails']}"
                yield Finding(identity.arn, what, f"see {warning['learnMoreLink']}")


@rule(
    "role/shared",
    Severity.MEDIUM,
    "Whoever breaks into one of these services then has the rights of all of them.",
)
def shared(account: Account) -> Iterator[Finding]:
    for identity in account.identities:
        services = sorted(set(identity.services))
        if len(services) > 1:
            what = f"role {identity.name} serves {', '.join(services)}"
            change = "make one role for each service: python -m launch up does"
            yield Finding(identity.arn, what, change)


@rule("role/unused", Severity.LOW, "Rights that nobody uses help only an attacker.")
def unused(account: Account) -> Iterator[Finding]:
    for identity in account.identities:
        last = identity.used or identity.created
        if identity.kind != "role" or last is None or account.days_since(last) <= UNUSED_DAYS:
            continue
        since = "never used"
        if identity.used is not None:
            since = f"not used for {account.days_since(last):.0f} days"
        delete = f"aws iam delete-role --role-name {shlex.quote(identity.name)}"
        change = f"delete it: {delete} (after its policies)"
        yield Finding(identity.arn, f"role {identity.name} was {since}", change)


def _policy(identity: Identity, policy: Policy) -> str:
    return f"policy {policy.name} of {identity.kind} {identity.name}"
