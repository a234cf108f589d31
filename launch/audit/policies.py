"""Policies: what each statement allows, and a narrower policy to propose.

cloudsplaining and policy_sentry know AWS's actions, and which of them can be limited to a resource.
"""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from launch.audit.account import Account, Description, Identity, Policy
from launch.cloud.account_stack import as_list
from trainer.common.errors import needed_by

if TYPE_CHECKING:
    from cloudsplaining.scan.statement_detail import StatementDetail

# Our policy for a role of that service.
ROLE_OF_SERVICE = {"sagemaker": "training", "lambda": "lambda", "ec2": "ec2"}
# Characters that a policy may have, by where it is stored.
# https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
LONGEST = 6144
LONGEST_INLINE = {"user": 2048, "group": 5120}


def load_rule_sets() -> None:
    """Raise UserError if the libraries that know AWS's actions are not installed."""
    with needed_by("audit", "audit"):
        # imported here: optional, and slow, as in each function below
        import cloudsplaining.scan.statement_detail  # noqa: F401
        import policy_sentry.querying.actions  # noqa: F401


# --- what a policy allows ---


def own(account: Account) -> Iterator[tuple[Identity, Policy]]:
    """Yield the policies that the account's owner wrote; AWS's can only be detached."""
    for identity in account.identities:
        for policy in identity.policies:
            if not policy.by_aws:
                yield identity, policy


def by_aws(account: Account) -> Iterator[tuple[Identity, Policy]]:
    """Yield the policies that AWS wrote."""
    for identity in account.identities:
        for policy in identity.policies:
            if policy.by_aws:
                yield identity, policy


def allowing(account: Account) -> Iterator[tuple[Identity, Policy, "StatementDetail"]]:
    """Yield the Allow statements of own policies."""
    for identity, policy in own(account):
        for statement in details(policy.document):
            if statement.effect == "Allow":
                yield identity, policy, statement


def details(document: Description) -> list["StatementDetail"]:
    """Return a policy's statements as cloudsplaining's objects."""
    statements = as_list(document.get("Statement", []))
    return [_detail(json.dumps(statement, default=str)) for statement in statements]


@cache
def _detail(statement: str) -> "StatementDetail":
    # imported here: slow, and optional (load_rule_sets says what is missing)
    from cloudsplaining.scan.statement_detail import StatementDetail

    return StatementDetail(json.loads(statement))


def whole_services(statement: "StatementDetail") -> list[str]:
    """Return the entries of a statement that allow all of a service, or everything."""
    return [action for action in statement.actions if action == "*" or action.endswith(":*")]


def can_be_narrowed(statement: "StatementDetail") -> bool:
    """Return whether a statement names its actions, but allows them on every resource."""
    return (
        statement.effect == "Allow"
        and statement.has_resource_wildcard
        and not statement.has_condition
        and not statement.not_action
        and not whole_services(statement)
    )


def reads_settings(action: str) -> bool:
    """Return whether an action only lists, or reads settings and no stored data."""
    contents = ("GetObject", "GetFunction", "GetParameter", "GetSecret", "Invoke")
    levels = {entry["access_level"] for entry in _facts(action)}
    return bool(levels) and levels <= {"List", "Read"} and not _name(action).startswith(contents)


def resource_forms(action: str) -> list[str]:
    """Return the ARNs that an action takes, like arn:${Partition}:s3:::${BucketName}.

    The service's main kinds come first.
    """
    forms = [entry["resource_arn_format"] for entry in _facts(action)]
    return [form for form in forms if form != "*"]


def _facts(action: str) -> list[Description]:
    # imported here: slow, and optional (load_rule_sets says what is missing)
    from policy_sentry.querying.actions import get_action_data

    data: Any = get_action_data(*action.split(":"))
    return [entry for entries in (data or {}).values() for entry in entries]


def _name(action: str) -> str:
    return action.partition(":")[2]


# --- what to change ---


def detach(identity: Identity, policy: Policy) -> str:
    """Return the command that detaches AWS's policy, and what to attach instead."""
    kind = identity.kind
    named = (f"--{kind}-name", identity.name, "--policy-arn", str(policy.arn))
    detach = shlex.join(["aws", "iam", f"detach-{kind}-policy", *named])
    return (
        f"{detach}; "
        "give it what it needs instead, as "
        f"python -m launch policy --for {shlex.quote(_ours(identity))} shows"
    )


def narrow(identity: Identity, policy: Policy) -> str:
    """Return the advice if the exact policy can't be computed."""
    return (
        f"name the actions and resources in policy {policy.name}; "
        f"python -m launch policy --for {shlex.quote(_ours(identity))} shows what is needed"
    )


def put_narrowed(account: Account, identity: Identity, policy: Policy) -> str:
    """Return the command that limits a policy to the account's own resources."""
    document = with_resources(account, policy.document)
    longest = LONGEST
    if policy.arn is None:
        longest = LONGEST_INLINE.get(identity.kind, LONGEST)
    if reason := refused(account, document, longest):
        return f"{narrow(identity, policy)} (the exact policy is not shown: {reason})"
    if policy.arn:
        command = f"create-policy-version --policy-arn {policy.arn} --set-as-default"
    else:
        kind = identity.kind
        command = f"put-{kind}-policy --{kind}-name {identity.name} --policy-name {policy.name}"
    return f"aws iam {command} --policy-document '{json.dumps(document, default=str)}'"


def refused(account: Account, document: Description, longest: int = LONGEST) -> str:
    """Return why a policy must not be proposed: IAM would refuse it, or it is too long to read.

    longest: in characters. Return "" if nothing is wrong. AWS is asked if the caller may.
    """
    text = json.dumps(document, default=str)
    if len(text) > longest:
        return f"it would have {len(text):,} characters, more than {longest:,}"
    statements = document["Statement"]
    for statement in statements:
        for key in ("Action", "Resource"):
            if (key in statement) == (f"Not{key}" in statement):
                return f"a statement needs either {key} or Not{key}"
        if not as_list(statement.get("Action", "*")) or not as_list(statement.get("Resource", "*")):
            return "a statement's list is empty"
    names = [statement["Sid"] for statement in statements if "Sid" in statement]
    if len(set(names)) < len(names):
        return "two statements have one Sid"
    for finding in account.aws_validates(text) or []:
        if finding["findingType"] == "ERROR":
            return f"AWS would refuse it: {finding['findingDetails']}"
    return ""


def with_resources(account: Account, document: Description) -> Description:
    """Return the policy with each `*` replaced by the ARNs of the account's resources.

    Actions that can't be limited to a resource keep it. So do statements that a person must decide:
    those that allow all of a service, or all but a list (NotAction).
    """
    statements: list[Description] = []
    for statement in details(document):
        if not can_be_narrowed(statement):
            statements.append(statement.statement)
            continue
        by_resources: dict[tuple[str, ...], list[str]] = {}
        for action in sorted(set(statement.restrictable_actions)):
            by_resources.setdefault(tuple(_arns(account, action)), []).append(action)
        if unrestrictable := sorted(set(statement.unrestrictable_actions)):
            by_resources[("*",)] = unrestrictable
        original = statement.statement
        for arns, actions in by_resources.items():
            resource: str | list[str] = list(arns)
            if arns == ("*",):
                resource = "*"
            statements.append({**original, "Action": actions, "Resource": resource})
            # A Sid must be unique in a policy.
            original = {key: value for key, value in original.items() if key != "Sid"}
    return {**document, "Statement": statements}


def _arns(account: Account, action: str) -> list[str]:
    """Return the resources that an action can be limited to.

    The account's own resources of that kind, or their ARN with a place for the name.
    """
    filled = {"Partition": account.partition, "Region": account.region, "Account": account.id}

    def fill(match: re.Match[str]) -> str:
        return filled.get(match[1], match[1].upper())

    known = list(_known(account))
    matching, templates = [], []
    for form in resource_forms(action):
        literals = re.split(r"\$\{\w+\}", form)
        pattern = "[^:/]+".join(re.escape(literal) for literal in literals)
        matching += [arn for arn in known if re.fullmatch(pattern, arn)]
        templates.append(re.sub(r"\$\{(\w+)\}", fill, form))
    return matching or templates[:1]


def _known(account: Account) -> Iterator[str]:
    for bucket in account.buckets:
        arn = f"arn:{account.partition}:s3:::{bucket['Name']}"
        yield arn
        yield f"{arn}/*"
    for endpoint in account.endpoints:
        yield endpoint["EndpointArn"]
    for notebook in account.notebooks:
        yield notebook["NotebookInstanceArn"]
    for function in account.functions:
        yield function["FunctionArn"]
    for identity in account.identities:
        yield identity.arn


def _ours(identity: Identity) -> str:
    """Return the part of Packhorse whose policy such an identity needs."""
    if identity.kind != "role":
        return "launcher"
    parts = [ROLE_OF_SERVICE[name] for name in identity.services if name in ROLE_OF_SERVICE]
    return parts[0] if parts else "training"
