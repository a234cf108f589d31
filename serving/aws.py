"""The one place of `serving` that talks to AWS: retries, timeouts, and AWS's errors in one line with what to do.

Plain boto3 below: profiles, regions and AWS_ENDPOINT_URL work as in every AWS tool.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from boto3.session import Session

CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 60  # seconds; SageMaker's own limit for an endpoint's answer
ATTEMPTS = 5  # of one call, with growing pauses: botocore's standard mode

SIGN_IN = "sign in (aws sso login, aws configure), or name a profile in AWS_PROFILE"

# What to do about an error, by AWS's code (a regular expression over the whole of it).
REMEDIES = {
    r"ExpiredToken(Exception)?|RequestExpired|InvalidClientTokenId|UnrecognizedClient(Exception)?|SignatureDoesNotMatch|InvalidAccessKeyId": SIGN_IN,
    r"AccessDenied(Exception)?|403": "ask who administers the account for this permission",
    r"NoSuchBucket|404": "make the project's bucket with: python -m launch up; or name yours with --bucket",
    r"(ResourceLimit|Limit)Exceeded(Exception)?": "ask for a larger quota at https://console.aws.amazon.com/servicequotas, or --set InstanceType=...",
    r"Throttling(Exception)?|TooManyRequestsException|SlowDown": "AWS asks for fewer calls: wait a minute and start the same command again",
    r"ServiceUnavailable(Exception)?|InternalError|InternalFailure|ServiceException|500|503": "a fault at AWS: start the same command again later",
}


class AwsError(UserError):
    """What AWS answered, in one line. code: AWS's own, or the name of botocore's exception."""

    def __init__(self, line: str, code: str, message: str) -> None:
        super().__init__(line)
        self.code, self.message = code, message


class Aws:
    """An account and a region, through boto3."""

    def __init__(self, region: str | None) -> None:
        """region: None for the one that AWS's tools would take."""
        self._region = region
        self._clients: dict[str, Any] = {}

    @cached_property
    def _session(self) -> "Session":
        try:
            import boto3
        except ImportError as error:
            raise UserError("boto3 is not installed, which talks to AWS: pip install 'packhorse[aws]'") from error
        try:
            return boto3.session.Session(region_name=self._region)
        except Exception as error:
            raise explained(error, "") from error

    def configured(self) -> bool:
        """Whether there are credentials and a region; whether AWS accepts them, only a call can tell."""
        try:
            return self._session.region_name is not None and self._session.get_credentials() is not None
        except Exception as error:
            raise explained(error, "") from error

    @property
    def region(self) -> str:
        if self._session.region_name is None:
            raise UserError("no AWS region is set: give --region us-east-1, say, or set AWS_REGION")
        return str(self._session.region_name)

    @property
    def partition(self) -> str:
        return str(self._session.get_partition_for_region(self.region))

    @cached_property
    def account(self) -> str:
        return str(self.call("sts", "get_caller_identity")["Account"])

    def client(self, service: str) -> Any:
        from botocore.config import Config

        if service not in self._clients:
            # Asking the model twice because the answer was slow would pay for it twice.
            attempts = 1 if service in ("lambda", "sagemaker-runtime") else ATTEMPTS
            retries = {"mode": "standard", "total_max_attempts": attempts}
            config = Config(retries=retries, connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT)
            self._clients[service] = self._session.client(service, region_name=self.region, config=config)
        return self._clients[service]

    def call(self, service: str, method: str, **parameters: Any) -> Any:
        """One call of boto3's client. Raises AwsError."""
        try:
            return getattr(self.client(service), method)(**parameters)
        except Exception as error:
            raise explained(error, f"{service} {method}") from error

    def find(self, service: str, method: str, absent: str, **parameters: Any) -> Any | None:
        """One call that asks for something; None where AWS says that it is not there. absent: a regular expression, for the code or message."""
        try:
            return self.call(service, method, **parameters)
        except AwsError as error:
            if re.search(absent, f"{error.code}: {error.message}"):
                return None
            raise

    def pages(self, service: str, method: str, key: str, **parameters: Any) -> Iterator[Any]:
        """All items of the list `key` in the answers to a call that AWS answers in pages. Raises AwsError."""
        try:
            for page in self.client(service).get_paginator(method).paginate(**parameters):
                yield from page.get(key, [])
        except Exception as error:
            raise explained(error, f"{service} {method}") from error


def explained(error: Exception, action: str) -> Exception:
    """An exception of boto3's as AwsError; any other as it is."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code, message = str(error.response["Error"].get("Code", "")), " ".join(str(error.response["Error"].get("Message", "")).split())
        remedy = next((f"; {remedy}" for pattern, remedy in REMEDIES.items() if re.fullmatch(pattern, code)), "")
        return AwsError(f"{action}: {code} ({message}){remedy}", code, message)
    no_credentials = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError, exceptions.SSOError)
    if isinstance(error, no_credentials):
        return AwsError(f"no AWS credentials ({error}): {SIGN_IN}", type(error).__name__, str(error))
    if isinstance(error, exceptions.HTTPClientError):
        return AwsError(
            f"{action}: AWS can't be reached ({error}); check the network, the region and AWS_ENDPOINT_URL", type(error).__name__, str(error)
        )
    if isinstance(error, (exceptions.BotoCoreError, Boto3Error)):
        return AwsError(" ".join(f"{action}: {error}".split()), type(error).__name__, str(error))
    return error
