"""The one place that talks to AWS: sessions, retries, timeouts, errors in one line with a remedy.

It uses plain boto3: profiles, regions and AWS_ENDPOINT_URL work as in every AWS tool. Both `launch`
and `serving/deploy` use it.
"""

import copy
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from getpass import getpass
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from boto3.session import Session
from botocore import exceptions, xform_name
from botocore.config import Config
from botocore.parsers import ResponseParserError
from botocore.utils import JSONFileCache

from launch.cloud.remedies import CREDENTIALS, NO_REGION, NOT_THIS_ONE, refusal, remedy
from launch.cloud.request import Request, check, core_session
from trainer.common.errors import UserError

CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 60  # seconds
HURRIED = 2, 8  # attempts, and seconds to read, of a call that may fail without harm
ATTEMPTS = 6  # of one call, with growing pauses: botocore's standard mode
# How to sign in with a profile, by the setting that it has.
SIGN_INS = {
    "sso_session": "aws sso login",
    "sso_start_url": "aws sso login",
    "login_session": "aws login",
}
# Services that are called once: a retry after a slow answer would pay for the model twice.
ONCE = ("lambda", "sagemaker-runtime")

# Where the AWS CLI keeps the session of an MFA code, so that the user types one once an hour.
CLI_CACHE = Path.home() / ".aws" / "cli" / "cache"
CACHED_BY_CLI = ("assume-role", "assume-role-with-web-identity")  # botocore's providers
WEB_PAGE = "text/html"


def bucket_name(project: str, account: str, region: str) -> str:
    """Return the name of the project's bucket."""
    return f"{project}-{account}-{region}"


def role_name(project: str, part: str, region: str) -> str:
    """Return the name of an account stack's role: IAM's names must differ between regions."""
    return f"{project}-{part}-{region}"


@cache
def partition(region: str) -> str:
    """Return the partition of a region, as in its ARNs: aws, aws-cn, aws-us-gov.

    Raise UserError for an unknown region.
    """
    try:
        return str(core_session().get_partition_for_region(region))
    except exceptions.UnknownRegionError as error:
        raise UserError(f"{region}: AWS has no such region; give one like us-east-1") from error


@cache
def domain(region: str) -> str:
    """Return the domain below which a region's services are reached, like amazonaws.com."""
    known = core_session().get_data("partitions")["partitions"]
    outputs = {each["id"]: each["outputs"] for each in known}
    return str(outputs[partition(region)]["dnsSuffix"])


class AwsError(UserError):
    """An error of a call to AWS, in one line. code: AWS's own, or the name of botocore's exception.

    refused: whether AWS has certainly not executed the call; after a fault of AWS it may have.
    """

    def __init__(self, line: str, code: str, message: str, refused: bool = False) -> None:
        super().__init__(line)
        self.code, self.message, self.refused = code, message, refused

    @property
    def passes(self) -> bool:
        """Whether the same call may succeed later: after an outage, or a new sign-in."""
        if self.code == exceptions.ParamValidationError.__name__:
            return False
        row = refusal(self.code, self.message)
        return not self.refused or (row is not None and row.passes)


class Aws:
    """A project's account and region, through boto3."""

    def __init__(self, project: str, region: str | None = None, bucket: str | None = None) -> None:
        """region: None: as AWS's tools choose it. bucket: None: the project's."""
        self.project, self._given_region, self.own_bucket = project, region, bucket
        self._attempts, self._read_timeout = ATTEMPTS, READ_TIMEOUT
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, str], Any] = {}

    @cached_property
    def _session(self) -> Session:
        try:
            core = core_session()
            # AWS's other tools read AWS_REGION, boto3 AWS_DEFAULT_REGION alone.
            region = self._given_region or os.environ.get("AWS_REGION")
            session = Session(region_name=region, botocore_session=core)
            _share_cli_cache(core)
            return session
        except Exception as error:
            raise explained(error, "") from error

    def hurried(self) -> "Aws":
        """Return the same account for calls that should wait for seconds, not minutes."""
        other = copy.copy(self)
        other._clients = {}
        other._attempts, other._read_timeout = HURRIED
        return other

    def renew(self) -> None:
        """Forget the credentials, so that the next call reads those of a new sign-in."""
        self.__dict__.pop("_session", None)
        self._clients.clear()

    @property
    def configured_region(self) -> str | None:
        """Return the region that is set where AWS's tools look; None where none is set."""
        region: str | None = self._session.region_name
        return region

    @property
    def region(self) -> str:
        if self.configured_region is None:
            raise UserError(NO_REGION)
        return self.configured_region

    @property
    def partition(self) -> str:
        return partition(self.region)

    def has_credentials(self) -> bool:
        """Return whether there are credentials; only a call can tell whether AWS accepts them.

        Raise AwsError, for a missing profile for example.
        """
        try:
            return self._session.get_credentials() is not None
        except Exception as error:
            raise explained(error, "") from error

    @cached_property
    def account(self) -> str:
        """Return the account's id. Asks AWS for it."""
        return str(self.call("sts", "GetCallerIdentity")["Account"])

    @property
    def bucket(self) -> str:
        return self.own_bucket or bucket_name(self.project, self.account, self.region)

    def owns(self, tags: Iterable[Mapping[str, str]]) -> bool:
        """Return whether a resource with these tags is ours (launch/cloud/ownership.py)."""
        return any(tag["Key"] == "project" and tag["Value"] == self.project for tag in tags)

    def client(self, service: str, region: str | None = None) -> Any:
        """Return boto3's client, made once. Several threads may call its methods."""
        with self._lock:  # boto3's session makes one client at a time
            return self._client(service, region or self.region)

    def _client(self, service: str, region: str) -> Any:
        key = (service, region)
        if key not in self._clients:
            attempts = 1 if service in ONCE else self._attempts
            retries = {"mode": "standard", "total_max_attempts": attempts}
            config = Config(
                retries=retries,
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=self._read_timeout,
                max_pool_connections=32,
            )
            try:
                client = self._session.client(service, region_name=key[1], config=config)
            except Exception as error:
                raise explained(error, service) from error
            if service == "s3":
                client.meta.events.register("provide-client-params.s3", self._expect_owner)
            self._clients[key] = client
        return self._clients[key]

    def _expect_owner(self, params: dict[str, Any], model: Any, **_: Any) -> dict[str, Any]:
        """Return an S3 call's parameters, limited to this account: bucket names can be guessed."""
        takes = "ExpectedBucketOwner" in model.input_shape.members
        if takes and params.get("Bucket") == self.bucket:
            params.setdefault("ExpectedBucketOwner", self.account)
        return params

    def prepare(self, services: Iterable[str]) -> None:
        """Make the clients of services, which threads may share but not make. Raise AwsError."""
        for service in services:
            self.client(service)

    def call(
        self, service: str, operation: str, *, region: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Make one call. Raise AwsError."""
        client = self.client(service, region)
        try:
            answer: dict[str, Any] = getattr(client, xform_name(operation))(**parameters)
        except Exception as error:
            raise explained(error, f"{service}:{operation}") from error
        return _checked(answer, f"{service}:{operation}")

    def find(
        self, service: str, operation: str, absent: str, **parameters: Any
    ) -> dict[str, Any] | None:
        """Make one call; return None where AWS answers that the resource doesn't exist.

        Raise AwsError for other errors. absent: a regular expression that matches "CODE: MESSAGE"
        of such an answer.
        """
        try:
            return self.call(service, operation, **parameters)
        except AwsError as error:
            if re.search(absent, f"{error.code}: {error.message}"):
                return None
            raise

    def send(self, request: Request) -> dict[str, Any]:
        """Send a request after the offline check.

        Raise UserError where the check refuses it, AwsError where AWS does.
        """
        check(request)
        return self.call(request.service, request.operation, **request.parameters)

    def pages(
        self, service: str, operation: str, key: str, **parameters: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield the items of the list `key` of an operation that AWS answers in pages.

        Raise AwsError.
        """
        paginator = self.client(service).get_paginator(xform_name(operation))
        try:
            for page in paginator.paginate(**parameters):
                yield from _checked(page, f"{service}:{operation}").get(key, [])
        except Exception as error:
            raise explained(error, f"{service}:{operation}") from error


def _share_cli_cache(core: Any) -> None:
    """Keep the sessions of MFA codes where the AWS CLI keeps them too."""
    shared = JSONFileCache(str(CLI_CACHE))
    resolver = core.get_component("credential_provider")
    for name in CACHED_BY_CLI:
        resolver.get_provider(name).cache = shared
    # getpass itself would print warnings first where there is no terminal.
    resolver.get_provider("assume-role")._prompter = _asked_code


def _asked_code(prompt: str) -> str:
    """Return the MFA code that the user types. Raise EOFError where there is no terminal."""
    if not sys.stdin.isatty():
        raise EOFError(prompt)
    return getpass(prompt)


def _checked(answer: dict[str, Any], action: str) -> dict[str, Any]:
    """Return AWS's answer. Raise AwsError for a web page, as hotels send with status 200."""
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    is_page = headers.get("content-type", "").startswith(WEB_PAGE)
    # An object in S3 may itself be a web page.
    if is_page and not any(name.startswith("x-amz") for name in headers):
        raise _not_aws(action, "a web page")
    return answer


def _not_aws(action: str, what: str) -> AwsError:
    line = (
        f"{action}: the answer is {what}, so it didn't come from AWS: sign in to this network "
        "(a hotel's Wi-Fi, for example), or check AWS_ENDPOINT_URL and proxies"
    )
    return AwsError(line, "ResponseParserError", line)


def explained(error: Exception, action: str) -> Exception:
    """Return any error of a call as AwsError; a UserError as it is.

    Besides botocore's own errors these are errors of its sources of credentials, and Python's for
    an endpoint that is not an address.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, exceptions.ClientError):
        return _refusal(error, action)
    # botocore looks up keys that every answer has: a page of well-formed HTML lacks them.
    if isinstance(error, ResponseParserError | LookupError):
        return _not_aws(action, "unreadable")
    line = _line(error, action or "the AWS profile").replace(CREDENTIALS, sign_in())
    return AwsError(" ".join(line.split()), type(error).__name__, str(error))


def sign_in() -> str:
    """Return how to get new credentials: the command for the profile in use, where it has one."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # it overrides a profile, and nothing renews it
        return (
            "AWS_ACCESS_KEY_ID and its companions are in use: set new ones, or unset them and "
            "sign in with a profile (AWS_PROFILE), and start the same command again"
        )
    core = core_session()
    try:
        profile, name = core.get_scoped_config(), core.profile or "default"
        seen = {name}
        while profile.get("source_profile", name) not in seen:
            name = profile["source_profile"]
            profile = core.full_config["profiles"][name]
            seen.add(name)
    except Exception:  # the profile itself is what is wrong
        return CREDENTIALS
    for key, how in SIGN_INS.items():
        if key in profile:
            return f"sign in: {how} --profile {shlex.quote(name)}"
    return CREDENTIALS


def _line(error: Exception, action: str) -> str:
    """Return the message for an exception that is not an answer of AWS, with what to do."""
    expired = f"the AWS session has expired ({error}): {CREDENTIALS}"
    unreachable = (
        f"{action}: AWS can't be reached ({error}): "
        "check the network, the region and AWS_ENDPOINT_URL, then start again"
    )
    # The first that fits counts.
    lines: dict[type[Exception], str] = {
        exceptions.NoCredentialsError: f"no AWS credentials: {CREDENTIALS}",
        exceptions.PartialCredentialsError: (
            f"the AWS credentials are incomplete ({error}): {CREDENTIALS}"
        ),
        exceptions.ProfileNotFound: (f"{error}: set AWS_PROFILE to one that is in ~/.aws/config"),
        exceptions.ConfigParseError: (
            f"{error}: correct this file, or name another in AWS_CONFIG_FILE"
        ),
        exceptions.SSOError: expired,
        exceptions.CredentialRetrievalError: f"no AWS credentials ({error}): {CREDENTIALS}",
        exceptions.TokenRetrievalError: expired,
        exceptions.NoRegionError: NO_REGION,
        exceptions.InvalidRegionError: f"{error}: give another region",
        exceptions.HTTPClientError: unreachable,
        exceptions.ConnectionError: unreachable,
        exceptions.BotoCoreError: f"{action}: {error}",
        Boto3Error: f"{action}: {error}",
        EOFError: (
            "the AWS profile asks for an MFA code, and nobody can be asked here: sign in once in "
            "a terminal (aws sts get-caller-identity); that session is then used here too"
        ),
        json.JSONDecodeError: (
            f"{action}: what should be JSON isn't ({error}): correct credential_process in "
            "~/.aws/config, or the file that it reads"
        ),
    }
    for kind, line in lines.items():
        if isinstance(error, kind):
            return line
    return (
        f"{action}: {error or type(error).__name__}: check the profile in ~/.aws/config, and "
        "AWS_ENDPOINT_URL, which is a whole address (http://...)"
    )


def _refusal(error: exceptions.ClientError, action: str) -> AwsError:
    """Return AWS's own answer, with the remedy for its code."""
    code = str(error.response["Error"].get("Code", ""))
    message = str(error.response["Error"].get("Message", ""))
    # EC2 says only "this operation": there the action is the name of the call.
    denied = re.search(r"not authorized to perform:? ([\w-]+:\w+)", message)
    if denied:
        action = denied[1]
    encoded = re.search(r"Encoded authorization failure message: \S+", message)
    shown = " ".join(message.replace(encoded[0], "").split()) if encoded else message
    line = f"{action}: {code}"
    if shown and shown != code:
        line += f" ({' '.join(shown.split())})"
    advice = remedy(code, message, action)
    if advice:
        line += f"; {advice.replace(CREDENTIALS, sign_in())}"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    refused = 400 <= status < 500 or re.fullmatch(NOT_THIS_ONE, code) is not None
    return AwsError(line, code, message, refused)
