"""The one place that talks to AWS: sessions, retries, timeouts, errors in one line with a remedy.

Plain boto3 below: profiles, regions and AWS_ENDPOINT_URL work as in every AWS tool. Both `launch`
and `serving/deploy` go through it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from boto3.exceptions import Boto3Error
from boto3.session import Session
from botocore import exceptions, xform_name
from botocore.config import Config
from botocore.parsers import ResponseParserError

from launch.cloud.request import Request, check, core_session
from trainer.common.errors import UserError

CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 60  # seconds
ATTEMPTS = 6  # of one call, with growing pauses: botocore's standard mode
# Asking a model again because the answer was slow would pay for it twice.
ONCE = ("lambda", "sagemaker-runtime")

DENIED = "AccessDenied(Exception)?|UnauthorizedOperation|UnauthorizedAccess|403"
NO_CAPACITY = (
    "InsufficientInstanceCapacity|InsufficientCapacity|CapacityError|InsufficientHostCapacity"
    "|SpotMaxPriceTooLow"
)
# A machine of another kind, in another zone, or bought otherwise may be had all the same.
NOT_THIS_ONE = (
    f"{NO_CAPACITY}|Unsupported|VcpuLimitExceeded|InstanceLimitExceeded|ResourceLimitExceeded"
    "|MaxSpotInstanceCountExceeded"
)
# Refusals that end by themselves, or when somebody signs in again.
FOR_NOW = (
    r"ExpiredToken(Exception)?|RequestExpired|TokenRefreshRequired|RequestTimeTooSkewed"
    r"|Throttling(Exception)?|ThrottledException|RequestLimitExceeded|TooManyRequestsException"
    r"|SlowDown|RequestThrottled"
)
PERMISSION = (
    "ask who administers the account for it; "
    "what this project needs: python -m launch policy --for launcher"
)
CREDENTIALS = "sign in (aws sso login, aws configure), or name a profile in AWS_PROFILE"
NO_REGION = (
    "no AWS region is set: set AWS_REGION, "
    "or give target.region=us-east-1 (python -m serving: --region us-east-1), say"
)
WAIT = "AWS asks for fewer calls: wait a minute and start the same command again"

# What to do about an error, by AWS's code (a regular expression over the whole of it).
REMEDIES = {
    r"ExpiredToken(Exception)?|RequestExpired|TokenRefreshRequired": (
        f"the credentials have expired: {CREDENTIALS}"
    ),
    r"InvalidClientTokenId|UnrecognizedClient(Exception)?|AuthFailure|InvalidAccessKeyId"
    r"|SignatureDoesNotMatch|InvalidSignature(Exception)?": (
        f"AWS does not know these credentials: {CREDENTIALS}; also check this machine's clock"
    ),
    DENIED: PERMISSION,
    r"InsufficientInstanceCapacity|InsufficientCapacity|CapacityError|Unsupported": (
        "AWS has no such machine free there now: start the same command again later, "
        "or take another instance type or region"
    ),
    r"VcpuLimitExceeded|InstanceLimitExceeded|ResourceLimitExceeded"
    r"|MaxSpotInstanceCountExceeded|LimitExceeded(Exception)?": (
        "the account's quota is too small: ask for more at "
        "https://console.aws.amazon.com/servicequotas (new accounts start with 0 GPUs), "
        "or take another instance type"
    ),
    r"Throttling(Exception)?|ThrottledException|RequestLimitExceeded|TooManyRequestsException"
    r"|SlowDown|RequestThrottled": WAIT,
    r"OptInRequired|InvalidRegion|AuthorizationHeaderMalformed|PermanentRedirect"
    r"|IllegalLocationConstraintException": (
        "this belongs to another region, or the region is not enabled: "
        "give the right one, in AWS_REGION say"
    ),
    r"NoSuchBucket": "there is no foundation here, which has the bucket: python -m launch up",
    r"ServiceUnavailable(Exception)?|ServiceException|InternalError|InternalFailure"
    r"|InternalServerError|500|503": "a fault at AWS: start the same command again later",
}


def bucket_name(project: str, account: str, region: str) -> str:
    """Return the name of the project's bucket."""
    return f"{project}-{account}-{region}"


def partition(region: str) -> str:
    """Return which of AWS's worlds a region belongs to, as ARNs begin with it."""
    if region.startswith("cn-"):
        return "aws-cn"
    if region.startswith("us-gov-"):
        return "aws-us-gov"
    return "aws"


class AwsError(UserError):
    """What AWS answered, in one line. code: AWS's own, or the name of botocore's exception.

    refused: whether AWS has surely not carried the call out; after a fault of its own it may have.
    """

    def __init__(self, line: str, code: str, message: str, refused: bool = False) -> None:
        super().__init__(line)
        self.code, self.message, self.refused = code, message, refused

    @property
    def passes(self) -> bool:
        """Whether the same call may be answered later: after an outage, or a new sign-in."""
        if self.code == exceptions.ParamValidationError.__name__:
            return False
        return not self.refused or re.fullmatch(FOR_NOW, self.code) is not None


class Aws:
    """A project's account and region, through boto3."""

    def __init__(self, project: str, region: str | None = None) -> None:
        """region: None for the one that AWS's tools would take."""
        self.project, self._given_region = project, region
        self._clients: dict[tuple[str, str], Any] = {}

    @cached_property
    def _session(self) -> Session:
        try:
            return Session(region_name=self._given_region, botocore_session=core_session())
        except Exception as error:
            raise explained(error, "") from error

    def renew(self) -> None:
        """Forget the credentials that were read, so that those of a new sign-in are."""
        self.__dict__.pop("_session", None)
        self._clients.clear()

    @property
    def configured_region(self) -> str | None:
        """Return the region that is set anywhere an AWS tool looks; None where there is none."""
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
        """Return whether there are any; whether AWS accepts them, only a call can tell.

        Raise AwsError for a profile that is not there, say.
        """
        try:
            return self._session.get_credentials() is not None
        except Exception as error:
            raise explained(error, "") from error

    @cached_property
    def account(self) -> str:
        """Return the account's id, which AWS tells."""
        return str(self.call("sts", "GetCallerIdentity")["Account"])

    @property
    def bucket(self) -> str:
        return bucket_name(self.project, self.account, self.region)

    def owns(self, tags: Iterable[Mapping[str, str]]) -> bool:
        """Return whether what has these tags is this project's (launch/cloud/ownership.py)."""
        return any(tag["Key"] == "project" and tag["Value"] == self.project for tag in tags)

    def client(self, service: str, region: str | None = None) -> Any:
        """Return boto3's client, made once. Its methods may be called from several threads."""
        key = (service, region or self.region)
        if key not in self._clients:
            retries = {"mode": "standard", "total_max_attempts": 1 if service in ONCE else ATTEMPTS}
            config = Config(
                retries=retries,
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                max_pool_connections=32,
            )
            try:
                self._clients[key] = self._session.client(
                    service, region_name=key[1], config=config
                )
            except Exception as error:
                raise explained(error, service) from error
        return self._clients[key]

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
            _check_sender(answer)
            return answer
        except Exception as error:
            raise explained(error, f"{service}:{operation}") from error

    def find(
        self, service: str, operation: str, absent: str, **parameters: Any
    ) -> dict[str, Any] | None:
        """Make one call that asks for something; return None where that is not there.

        Raise AwsError for anything else. absent: a regular expression over "CODE: MESSAGE".
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
                _check_sender(page)
                yield from page.get(key, [])
        except Exception as error:
            raise explained(error, f"{service}:{operation}") from error


def _check_sender(answer: Mapping[str, Any]) -> None:
    """Raise ResponseParserError where a page in HTML came in the place of AWS's answer.

    A network that wants a sign-in first answers so, with status 200, and such a page may read as an
    empty list, or as an object that is there. AWS names each request in a header or in the body.
    """
    metadata = answer["ResponseMetadata"]
    headers = metadata.get("HTTPHeaders", {})
    named = metadata.get("RequestId") or any(name.startswith("x-amz") for name in headers)
    if "text/html" in headers.get("content-type", "") and not named:
        raise ResponseParserError("it is a page in HTML")


def explained(error: Exception, action: str) -> Exception:
    """Return an exception of boto3's as AwsError; any other as it is."""
    if isinstance(error, exceptions.ClientError):
        return _refusal(error, action)
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
        exceptions.ProfileNotFound: (f"{error}: name one that is in ~/.aws/config in AWS_PROFILE"),
        exceptions.SSOError: expired,
        exceptions.CredentialRetrievalError: f"no AWS credentials ({error}): {CREDENTIALS}",
        exceptions.TokenRetrievalError: expired,
        exceptions.NoRegionError: NO_REGION,
        exceptions.InvalidRegionError: f"{error}: give another region",
        exceptions.HTTPClientError: unreachable,
        exceptions.ConnectionError: unreachable,
        ResponseParserError: (
            f"{action}: the answer can't be read, so it is not AWS's: "
            "check AWS_ENDPOINT_URL and proxies"
        ),
        exceptions.BotoCoreError: f"{action}: {error}",
        Boto3Error: f"{action}: {error}",
    }
    for kind, line in lines.items():
        if isinstance(error, kind):
            return AwsError(" ".join(line.split()), type(error).__name__, str(error))
    return error


def _refusal(error: exceptions.ClientError, action: str) -> AwsError:
    """Return what AWS itself has answered, with the remedy for its code."""
    code = str(error.response["Error"].get("Code", ""))
    message = str(error.response["Error"].get("Message", ""))
    denied = re.search(r"not authorized to perform:? (\S+)", message)
    if denied:
        action = denied[1].rstrip(".,")
    line = f"{action}: {code}"
    if message and message != code:
        line += f" ({' '.join(message.split())})"
    for pattern, remedy in REMEDIES.items():
        if re.fullmatch(pattern, code):
            line += f"; {remedy}"
            break
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    refused = 400 <= status < 500 or re.fullmatch(NOT_THIS_ONE, code) is not None
    return AwsError(line, code, message, refused)
