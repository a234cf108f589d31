"""Rules for roles, users and groups: what their policies allow, and who may become them.

cloudsplaining knows which actions can be held to a resource and which combinations let an identity raise its rights; parliament knows which actions,
keys and operators there are. Both need only the policy. What they leave out is here: full access by AWS's own policies, PassRole's condition, trust.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from launch.audit.account import Account, Description, Identity, Policy, listed
from launch.audit.finding import Found, Severity, rule
from trainer.common.errors import UserError, install_command

if TYPE_CHECKING:
    from cloudsplaining.scan.policy_document import PolicyDocument
    from cloudsplaining.scan.statement_detail import StatementDetail

# Actions that cloudsplaining reports as exposing credentials although what they give is no more than the caller's own rights.
HARMLESS_CREDENTIALS = {"ecr:GetAuthorizationToken"}
# What parliament finds that is certain; its RESOURCE_MISMATCH is wrong where an action needs resources in several statements (ec2:RunInstances).
CERTAIN = {
    "UNKNOWN_ACTION",
    "UNKNOWN_PREFIX",
    "UNKNOWN_CONDITION_FOR_ACTION",
    "UNKNOWN_OPERATOR",
    "MISMATCHED_TYPE",
    "MALFORMED",
    "INVALID_ARN",
    "INVALID_SID",
}

ROLE_OF_SERVICE = {
    "sagemaker": "training",
    "lambda": "lambda",
    "ec2": "ec2",
}  # which policy of ours serves a role of that service
MANY = 6  # actions named in a finding


def load_rule_sets() -> None:
    """Raises UserError where the rule sets are not installed."""
    try:
        import cloudsplaining.scan.policy_document  # noqa: F401

        with warnings.catch_warnings(action="ignore"):  # it announces that it uses pkg_resources
            import parliament  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"audit needs {error.name}: {install_command('audit')}") from error


@rule(
    "role/everything",
    Severity.CRITICAL,
    "Whoever gets hold of it, by a leaked key, a notebook or a poisoned package, owns the account.",
)
def everything(account: Account) -> Iterator[Found]:
    for identity in account.identities:
        for policy in identity.policies:
            if policy.by_aws and policy.name in (
                "AdministratorAccess",
                "PowerUserAccess",
                "IAMFullAccess",
            ):
                yield Found(
                    identity.arn,
                    f"{identity.kind} {identity.name} has AWS's policy {policy.name}",
                    _detach(identity, policy),
                )
            elif not policy.by_aws and any(
                "*" in statement.actions for statement in _wide_open(policy)
            ):
                yield Found(
                    identity.arn,
                    f"policy {policy.name} of {identity.kind} {identity.name} allows every action on everything",
                    _narrow(identity, policy),
                )


@rule(
    "role/full-access",
    Severity.HIGH,
    "An attacker who gets a job or a notebook with it controls every resource of that service in the account, other teams' too.",
)
def full_access(account: Account) -> Iterator[Found]:
    for identity in account.identities:
        for policy in identity.policies:
            if (
                policy.by_aws
                and policy.name.endswith(("FullAccess", "FullAccessV2", "_FullAccess"))
                and policy.name != "IAMFullAccess"
            ):
                yield Found(
                    identity.arn,
                    f"{identity.kind} {identity.name} has AWS's policy {policy.name}",
                    _detach(identity, policy),
                )


@rule(
    "role/wildcard-action",
    Severity.HIGH,
    "It grants what the service will offer tomorrow too, and deleting and sharing besides what the job does.",
)
def wildcard_action(account: Account) -> Iterator[Found]:
    for identity, policy, statement in _allowing(account):
        if services := [action for action in statement.actions if action.endswith(":*")]:
            yield Found(
                identity.arn,
                f"policy {policy.name} of {identity.kind} {identity.name} allows {', '.join(services)}",
                _narrow(identity, policy),
            )


@rule(
    "role/wildcard-resource",
    Severity.HIGH,
    "The statement reaches every resource of the account, other projects' models, data and functions too, where this identity needs a few.",
)
def wildcard_resource(account: Account) -> Iterator[Found]:
    for identity, policy, statement in _allowing(account):
        # A service's wildcard has a finding of its own; what only lists or reads settings gives away little.
        if (
            not statement.has_resource_wildcard
            or statement.has_condition
            or any(action == "*" or action.endswith(":*") for action in statement.actions)
        ):
            continue
        actions = [
            action
            for action in statement.restrictable_actions
            if action != "iam:PassRole" and not _reads_settings(action)
        ]
        if actions:
            what = f"policy {policy.name} of {identity.kind} {identity.name} allows {_some(actions)} on every resource"
            yield Found(
                identity.arn,
                what,
                _put(identity, policy, _with_resources(account, policy.document)),
            )


@rule(
    "role/pass-role",
    Severity.HIGH,
    "Whoever may pass any role to any service may start a machine with the account's strongest role and act as it.",
)
def pass_role(account: Account) -> Iterator[Found]:
    for identity, policy, statement in _allowing(account):
        if "iam:PassRole" not in statement.expanded_actions or "*" in statement.actions:
            continue
        faults = []
        if "iam:passedtoservice" not in _condition_keys(statement.statement):
            faults.append("to any service (no condition on iam:PassedToService)")
        if any(arn == "*" or arn.endswith(":role/*") for arn in statement.resources):
            faults.append("any role")
        if faults:
            services = (
                identity.services
                if set(identity.services) & set(ROLE_OF_SERVICE)
                else ["sagemaker"]
            )
            narrow = {
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": f"arn:{account.partition}:iam::{account.id}:role/NAME_OF_THE_JOBS_ROLE",
                "Condition": {
                    "StringEquals": {"iam:PassedToService": f"{services[0]}.amazonaws.com"}
                },
            }
            what = f"policy {policy.name} of {identity.kind} {identity.name} may pass {', '.join(reversed(faults))}"
            yield Found(
                identity.arn,
                what,
                f"replace the statement in policy {policy.name} by {json.dumps(narrow)}",
            )


@rule(
    "role/not-action",
    Severity.HIGH,
    "An Allow of everything but a list grants every action that the author did not think of.",
)
def not_action(account: Account) -> Iterator[Found]:
    for identity, policy, statement in _allowing(account):
        for key in ("NotAction", "NotResource"):
            if key in statement.statement:
                what = f"policy {policy.name} of {identity.kind} {identity.name} allows with {key}"
                yield Found(identity.arn, what, _narrow(identity, policy))


@rule(
    "role/escalation",
    Severity.HIGH,
    "It can give itself, or a machine that it starts, rights that it was not given.",
)
def escalation(account: Account) -> Iterator[Found]:
    for identity, policy in _own(account):
        if ways := _document(policy).allows_privilege_escalation:
            names = ", ".join(f"{way['type']} ({' + '.join(way['actions'])})" for way in ways[:3])
            what = f"policy {policy.name} of {identity.kind} {identity.name} allows {names}" + (
                f" and {len(ways) - 3} more ways" if len(ways) > 3 else ""
            )
            yield Found(identity.arn, what, _narrow(identity, policy))


@rule(
    "role/permissions-management",
    Severity.HIGH,
    "It may change who may do what, to every resource of the account.",
)
def permissions_management(account: Account) -> Iterator[Found]:
    for identity, policy in _own(account):
        actions = sorted(
            set(_document(policy).permissions_management_without_constraints) - {"iam:PassRole"}
        )
        if actions and not _wildcards(policy):
            what = f"policy {policy.name} of {identity.kind} {identity.name} allows {_some(actions)} on every resource"
            yield Found(
                identity.arn,
                what,
                _put(identity, policy, _with_resources(account, policy.document)),
            )


@rule("role/credentials", Severity.HIGH, "It hands out credentials or signed links of others.")
def credentials(account: Account) -> Iterator[Found]:
    for identity, policy in _own(account):
        actions = sorted(set(_document(policy).credentials_exposure) - HARMLESS_CREDENTIALS)
        if actions and not _wildcards(policy):
            what = f"policy {policy.name} of {identity.kind} {identity.name} allows {_some(actions)} on every resource"
            yield Found(
                identity.arn,
                what,
                _put(identity, policy, _with_resources(account, policy.document)),
            )


@rule(
    "role/mistake",
    Severity.LOW,
    "The statement does not do what it says: it grants nothing, or its condition never holds.",
)
def mistake(account: Account) -> Iterator[Found]:
    import parliament

    for identity, policy in _own(account):
        for finding in parliament.analyze_policy_string(
            json.dumps(policy.document, default=str)
        ).findings:
            if finding.issue in CERTAIN:
                what = f"policy {policy.name} of {identity.kind} {identity.name}: {finding.issue.lower().replace('_', ' ')}: {finding.detail}"
                yield Found(identity.arn, what, f"correct or remove it in policy {policy.name}")


@rule(
    "role/anyone",
    Severity.CRITICAL,
    "Anyone with an AWS account, of any company, can become this role.",
)
def anyone(account: Account) -> Iterator[Found]:
    for identity, statement in _trusting(account):
        if "*" in _principals(statement) and not statement.get("Condition"):
            what = f"role {identity.name} may be assumed by any principal of any account"
            yield Found(identity.arn, what, _trust(identity, _service_of(identity)))


@rule(
    "role/other-account",
    Severity.MEDIUM,
    "Without an external id, another customer of that account can make it act on you (the confused deputy).",
)
def other_account(account: Account) -> Iterator[Found]:
    for identity, statement in _trusting(account):
        others = [
            name
            for name in _principals(statement)
            if name != "*" and not name.startswith("arn:") and name != account.id
        ]
        others += [
            name
            for name in _principals(statement)
            if name.startswith("arn:") and name.split(":")[4] not in (account.id, "")
        ]
        if (
            others
            and "sts:externalid" not in _condition_keys(statement)
            and "aws:principalorgid" not in _condition_keys(statement)
        ):
            what = (
                f"role {identity.name} may be assumed by {', '.join(others)} without an external id"
            )
            condition = (
                '"Condition": {"StringEquals": {"sts:ExternalId": "A_SECRET_BETWEEN_YOU_TWO"}}'
            )
            yield Found(
                identity.arn, what, f"remove the account from the trust policy, or add {condition}"
            )


@rule(
    "role/shared",
    Severity.MEDIUM,
    "A fault in one service then has the rights of all: what only trains can answer requests, what only answers can train.",
)
def shared(account: Account) -> Iterator[Found]:
    for identity in account.identities:
        services = sorted(set(identity.services))
        if len(services) > 1:
            yield Found(
                identity.arn,
                f"role {identity.name} serves {', '.join(services)}",
                "make one role for each service: python -m launch up does",
            )


@rule(
    "role/any-source",
    Severity.LOW,
    "The service would use the role for a request from another account that names it (the confused deputy).",
)
def any_source(account: Account) -> Iterator[Found]:
    for identity, statement in _trusting(account):
        services = {
            name
            for entry in [statement.get("Principal", {})]
            if isinstance(entry, dict)
            for name in listed(entry.get("Service", []))
        }
        if "sagemaker.amazonaws.com" in services and not {
            "aws:sourceaccount",
            "aws:sourcearn",
        } & _condition_keys(statement):
            condition = json.dumps({"StringEquals": {"aws:SourceAccount": account.id}})
            what = f"role {identity.name} trusts SageMaker on behalf of any account"
            yield Found(identity.arn, what, f'add "Condition": {condition} to its trust policy')


@rule("role/unused", Severity.LOW, "Rights that nobody uses are only of use to an attacker.")
def unused(account: Account) -> Iterator[Found]:
    for identity in account.identities:
        if (
            identity.kind == "role"
            and identity.created
            and account.days_since(identity.used or identity.created) > 90
        ):
            since = (
                "never used"
                if identity.used is None
                else f"not used for {account.days_since(identity.used):.0f} days"
            )
            yield Found(
                identity.arn,
                f"role {identity.name} was {since}",
                f"delete it: aws iam delete-role --role-name {identity.name} (after its policies)",
            )


@rule(
    "user/old-key",
    Severity.MEDIUM,
    "A key that never changes ends up in a notebook, a shell history or a repository, and works from anywhere.",
)
def old_key(account: Account) -> Iterator[Found]:
    for identity in account.identities:
        for key in identity.keys:
            if key["Status"] == "Active" and (days := account.days_since(key["CreateDate"])) > 90:
                change = f"sign in by IAM Identity Center, or replace it: aws iam create-access-key --user-name {identity.name}"
                change += f"; aws iam delete-access-key --user-name {identity.name} --access-key-id {key['AccessKeyId']}"
                yield Found(
                    identity.arn,
                    f"access key {key['AccessKeyId']} of user {identity.name} is {days:.0f} days old",
                    change,
                )


@rule(
    "user/own-policy",
    Severity.LOW,
    "A policy written into a user is seen by no review of roles and groups, and stays when the person's task changes.",
)
def own_policy(account: Account) -> Iterator[Found]:
    for identity in account.identities:
        for policy in identity.policies:
            if identity.kind == "user" and policy.arn is None:
                change = f"move it to a role or group: aws iam delete-user-policy --user-name {identity.name} --policy-name {policy.name}"
                yield Found(
                    identity.arn,
                    f"user {identity.name} has a policy of their own: {policy.name}",
                    change,
                )


# --- reading policies ---


def _own(account: Account) -> Iterator[tuple[Identity, Policy]]:
    """The policies that the account's owner wrote: what AWS wrote can't be changed, only detached."""
    for identity in account.identities:
        for policy in identity.policies:
            if not policy.by_aws:
                yield identity, policy


def _allowing(account: Account) -> Iterator[tuple[Identity, Policy, "StatementDetail"]]:
    for identity, policy in _own(account):
        for statement in _document(policy).statements:
            if statement.effect == "Allow":
                yield identity, policy, statement


def _trusting(account: Account) -> Iterator[tuple[Identity, Description]]:
    for identity in account.identities:
        for statement in listed(identity.trust.get("Statement", [])):
            if statement.get("Effect") == "Allow":
                yield identity, statement


def _document(policy: Policy) -> "PolicyDocument":
    return _parsed(json.dumps(policy.document, default=str))


@cache
def _parsed(document: str) -> "PolicyDocument":
    from cloudsplaining.scan.policy_document import PolicyDocument

    return PolicyDocument(json.loads(document))


def _wide_open(policy: Policy) -> list["StatementDetail"]:
    return [
        entry
        for entry in _document(policy).statements
        if entry.effect == "Allow" and entry.has_resource_wildcard and not entry.has_condition
    ]


def _wildcards(policy: Policy) -> bool:
    """Whether a service's every action is allowed, which has a finding of its own."""
    return any(
        action == "*" or action.endswith(":*")
        for statement in _document(policy).statements
        for action in statement.actions
    )


def _reads_settings(action: str) -> bool:
    levels = {entry["access_level"] for entry in _facts(action)}
    # These read what is stored, not its settings.
    contents = action.split(":")[1].startswith(
        ("GetObject", "GetFunction", "GetParameter", "GetSecret", "Invoke")
    )
    return bool(levels) and levels <= {"List", "Read"} and not contents


def _condition_keys(statement: Description) -> set[str]:
    return {key.lower() for test in statement.get("Condition", {}).values() for key in test}


def _principals(statement: Description) -> list[str]:
    principal = statement.get("Principal", {})
    return ["*"] if principal == "*" else [str(name) for name in listed(principal.get("AWS", []))]


def _some(actions: Iterable[str]) -> str:
    names = sorted(actions)
    return ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")


# --- what to change ---


def _service_of(identity: Identity) -> str:
    return next((name for name in identity.services if name in ROLE_OF_SERVICE), "sagemaker")


def _ours(identity: Identity) -> str:
    return ROLE_OF_SERVICE[_service_of(identity)] if identity.kind == "role" else "launcher"


def _detach(identity: Identity, policy: Policy) -> str:
    detach = f"aws iam detach-{identity.kind}-policy --{identity.kind}-name {identity.name} --policy-arn {policy.arn}"
    return f"{detach}; give it what it needs instead, as python -m launch policy --for {_ours(identity)} shows"


def _narrow(identity: Identity, policy: Policy) -> str:
    return f"name the actions and resources in policy {policy.name}; python -m launch policy --for {_ours(identity)} shows what is needed"


def _put(identity: Identity, policy: Policy, document: Description) -> str:
    text = json.dumps(document, default=str)
    if policy.arn:
        return f"aws iam create-policy-version --policy-arn {policy.arn} --set-as-default --policy-document '{text}'"
    return f"aws iam put-{identity.kind}-policy --{identity.kind}-name {identity.name} --policy-name {policy.name} --policy-document '{text}'"


def _trust(identity: Identity, service: str) -> str:
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": f"{service}.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }
    document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    return f"aws iam update-assume-role-policy --role-name {identity.name} --policy-document '{document}'"


def _with_resources(account: Account, document: Description) -> Description:
    """The same policy with each `*` replaced by the ARNs of what the account has, where an action can be held to them."""
    statements = []
    for detail in _parsed(json.dumps(document, default=str)).statements:
        if detail.effect != "Allow" or not detail.has_resource_wildcard or detail.has_condition:
            statements.append(detail.statement)
            continue
        held = sorted(set(detail.restrictable_actions))
        by_resources: dict[tuple[str, ...], list[str]] = {}
        for action in held:
            by_resources.setdefault(tuple(_arns(account, action)), []).append(action)
        statements += [
            {**detail.statement, "Action": actions, "Resource": list(arns)}
            for arns, actions in by_resources.items()
        ]
        if free := sorted(set(detail.unrestrictable_actions)):
            statements.append({**detail.statement, "Action": free, "Resource": "*"})
    return {**document, "Statement": statements}


def _arns(account: Account, action: str) -> list[str]:
    """What an action can be held to: the account's own resources of the kind, or their ARN with a place for the name."""
    known = [
        *(
            arn
            for entry in account.buckets
            for arn in (
                f"arn:{account.partition}:s3:::{entry['Name']}",
                f"arn:{account.partition}:s3:::{entry['Name']}/*",
            )
        ),
        *(entry["EndpointArn"] for entry in account.endpoints),
        *(entry["NotebookInstanceArn"] for entry in account.notebooks),
        *(entry["FunctionArn"] for entry in account.functions),
        *(entry.arn for entry in account.identities),
    ]
    filled = {"Partition": account.partition, "Region": account.region, "Account": account.id}
    found, forms = [], []
    for form in resource_forms(action):
        pattern = (
            re.escape(re.sub(r"\$\{\w+\}", "\0", form))
            .replace("\0", "[^:/]+")
            .replace("\\\x00", "[^:/]+")
        )
        found += [arn for arn in known if re.fullmatch(pattern, arn)]
        forms.append(
            re.sub(r"\$\{(\w+)\}", lambda name: filled.get(name[1], name[1].upper()), form)
        )
    return found or forms[:1]


def resource_forms(action: str) -> list[str]:
    """The ARNs that an action takes, like arn:${Partition}:s3:::${BucketName}; the service's main kinds first."""
    return [
        entry["resource_arn_format"]
        for entry in _facts(action)
        if entry["resource_arn_format"] != "*"
    ]


def _facts(action: str) -> list[Description]:
    from policy_sentry.querying.actions import get_action_data

    data: Any = get_action_data(*action.split(":"))
    return [entry for entries in (data or {}).values() for entry in entries]
