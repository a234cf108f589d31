"""AWS for the tests: the moto server as a process of its own, behind a layer that is as strict as
AWS where moto is not.

    python -m tests.launch.aws RECORD        # listens on 127.0.0.1, says its URL on standard output

What the layer adds to moto 5.2:
- a second training job, tuning job or notebook of a name is refused; so are jobs whose role, bucket
  or code is not there;
- RunInstances honours ClientToken, and refuses user data over 16 KB, a missing instance profile,
  and what a test asked it to refuse;
- SageMaker's jobs run until a test ends them (`/strict/end`) or they are stopped; the calls that
  moto lacks: StopTrainingJob, DeleteTrainingJob, StopHyperParameterTuningJob,
  ListTrainingJobsForHyperParameterTuningJob, ListNotebookInstanceLifecycleConfigs, and the Price
  List's GetProducts;
- the default VPC has a way to the internet, and a group whose members reach each other; Service
  Quotas answers (`/strict/quota`);
- placement groups, which moto lacks: EC2 starts machines in one that is there, in one zone, and
  deletes one that no machine is in;
- CloudFormation refuses a stack or a change set that is there already, and a change set is executed
  once;
- a resource that outlives its stack (DeletionPolicy: Retain) stays where an update drops it; an
  update can change a log group, and adds what a condition has left out until then;
- the tags of a notebook's scripts, which moto forgets;
- AWS's public parameter of the Deep Learning AMI;
- a client with a name (below) says whose a bucket is whose name can be guessed: it ends in the
  account's number and the region;
- on request (`/strict/rude`) it answers the next so many calls as a network or AWS on a bad day:
  a connection that drops, a page in HTML with status 200, a token that has expired, a throttled or
  a denied call, an internal error, of all operations or of one, or only where a listing goes on;
- on request (`/strict/pages`) each listing comes in pages of so many, and more of them;
- the role of a stack that was just made is not there yet for as many calls as a test says
  (`/strict/slow_iam`);
- RunInstances has no machine of a kind, in a zone, spot or on demand, as a test says
  (`/strict/sold_out`);
- on request (`/strict/late`) what was just made is not there yet for as many answers as a test
  says, each time that one asks for it; a client without a name (below) sees it at once;
- a notebook that starts can't be stopped (`/strict/starting`), a placement group counts machines
  that have ended (`/strict/busy_groups`), the last of a job's log comes late (`/strict/end`), each
  for as many answers as a test says;
- spot machines have a price;
- instances end as a test says, with AWS's reasons (`/strict/end_instance`), and are as old as it
  says (`/strict/age`);
- IAM Identity Center lends credentials for a minute to whoever has a token (`aws sso login`);
- on request it kills the client at its Nth call, before the call reaches AWS or after AWS has
  carried it out (`/strict/kill`). A client says who it is by AWS_SDK_UA_APP_ID=pid-PID.

RECORD gets a line of JSON for each call that arrives, in the order of arrival:
    {"number": 1, "service": "sagemaker", "operation": "CreateTrainingJob",
     "parameters": {...}, "region": "us-east-1", "client": 4711, "status": 200}
service: the one that the request is signed for. parameters: by their names in botocore's model; for
the query protocols (EC2, IAM, STS, CloudFormation) flat, as on the wire ("Filter.1.Name"); bodies
that are no JSON are left out. status: HTTP's; null where the client was killed before the call was
carried out.
"""

import base64
import copy
import hashlib
import io
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote
from wsgiref.types import StartResponse, WSGIEnvironment

os.environ |= {"MOTO_ENABLE_AMI_VALIDATION": "1", "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "1"}

import botocore.exceptions
import botocore.session
from botocore.model import OperationModel
from moto.backends import get_backend
from moto.cloudformation.parsing import ResourceMap
from moto.core.utils import utcnow
from moto.iam.models import ManagedPolicy
from moto.logs.models import LogGroup
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

ACCOUNT = "123456789012"
REGION = "us-east-1"
TRAINING_GROUP = "/aws/sagemaker/TrainingJobs"
DLAMI = "/aws/service/deeplearning/ami/"
RUNNING = "InProgress"
# SageMaker's quotas: number and name.
LISTED_QUOTAS = [
    (f"L-{number:08X}", f"{machine} for {use} usage")
    for number, (machine, use) in enumerate(
        itertools.product(
            ("ml.p3.2xlarge", "ml.g4dn.xlarge", "ml.m5.2xlarge", "ml.m5.large", "ml.t3.medium"),
            ("training job", "spot training job", "notebook instance", "endpoint"),
        )
    )
]
# What a service answers to too many calls, where it isn't a ThrottlingException.
THROTTLES = {"ec2": "RequestLimitExceeded", "s3": "SlowDown", "cloudformation": "Throttling"}
# What a client sends with to get what follows a first page.
CONTINUED = {"NextToken", "nextToken", "ContinuationToken", "KeyMarker", "Marker"}
PRICES = json.loads(
    (Path(__file__).parents[2] / "launch/cloud/prices.json").read_text(encoding="utf-8")
)["regions"][REGION]["hours"]


class Refused(Exception):
    """An error as AWS answers it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code)
        self.code, self.message = code, message


class Strict:
    """The WSGI application: `moto`, and what stands in front of it."""

    def __init__(
        self, moto: Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]], record: Path
    ) -> None:
        self._moto, self._record = moto, record
        self._lock = threading.RLock()  # one call at a time: so that "the Nth call" means something
        self._reset()

    def _reset(self) -> None:
        self._number = 0
        self._tokens: dict[str, tuple[str, list[bytes]]] = {}
        self._script_tags: dict[str, list[dict[str, str]]] = {}  # by ARN
        self._refuse: dict[str, tuple[str, str]] = {}
        self._kill: dict[str, Any] = {"call": 0, "when": "before"}
        # How, of which operation, and whether only of what follows a first page: the next answers.
        self._rude: list[tuple[str, str, bool]] = []
        self._page = 0  # of how many things a page of a listing is; 0: as the caller asks
        self._slow_iam = 0
        self._sold_out: dict[str, str] = {}  # what fits TYPE ZONE MARKET -> AWS's code
        self._asked: dict[str, float] = {}  # dollars an hour by service, in the Price List
        self._starting: dict[str, int] = {}  # notebooks: answers until one is in service
        self._busy = 0  # answers in which a placement group is still in use
        self._silent = 0  # answers in which the last of a log has not come yet
        self._grouped: dict[str, list[str]] = {}  # ids of the machines in them
        self._groups: dict[str, dict[str, str]] = {}  # placement groups: their tags by name
        self._late = 0
        self._unseen: dict[str, int] = {}  # id or name -> answers in which it is not there yet
        self._named = False  # whether the client of the call at hand says who it is
        self._quotas: dict[str, float] = {}  # by number, or name
        self._closed = False  # whether the default VPC has no way out
        self._record.write_text("")

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if path.startswith("/moto-api"):
            return self._moto(environ, start)
        if path == "/federation/credentials":  # IAM Identity Center's, whose calls nobody signs
            return _answer(start, "200 OK", json.dumps({"roleCredentials": _lent()}).encode())
        with self._lock:
            if path.startswith("/strict/"):
                answer = getattr(self, path.removeprefix("/strict/"))(**json.loads(body or b"{}"))
                return _answer(start, "200 OK", json.dumps(answer or {}).encode())
            return self._serve(environ, start, body)

    def _serve(
        self, environ: WSGIEnvironment, start: StartResponse, body: bytes
    ) -> Iterable[bytes]:
        service, region, operation, parameters = understand(environ, body)
        self._number += 1
        client = re.search(r"app/pid-(\d+)", environ.get("HTTP_USER_AGENT", ""))
        entry = {
            "number": self._number, "service": service, "operation": operation,
            "parameters": parameters, "region": region,
            "client": int(client[1]) if client else None, "status": None,
        }  # fmt: skip
        self._named = client is not None
        if client is not None and self._page:
            parameters = _in_pages(environ, service, operation, parameters, self._page)
        doomed = client is not None and self._kill["call"] == self._number
        if doomed and self._kill["when"] == "before":
            self._write(entry)
            os.kill(int(client[1]), signal.SIGKILL)
            return _answer(start, "500 Killed", b"")
        later = bool(parameters.keys() & CONTINUED)
        rude = [each for each in self._rude if each[1] in ("", operation) and each[2] <= later]
        if client is not None and rude:
            self._rude.remove(rude[0])
            if rude[0][0] == "drop":
                self._write(entry)
                # werkzeug alone would keep it open, and the client would wait for its answer.
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionResetError("the network is gone")
            return self._rudely(rude[0][0], entry, service, start)
        status: list[Any] = []

        def remember(
            line: str, headers: list[tuple[str, str]], *rest: Any
        ) -> Callable[[bytes], object]:
            status[:] = [line, headers]
            return lambda data: None

        try:
            answer = list(
                self._strictly(
                    service,
                    operation,
                    copy.deepcopy(parameters),
                    region or REGION,
                    environ,
                    remember,
                )
            )
        except Refused as refusal:
            answer = _refusal(service, refusal, remember)
        entry["status"] = int(status[0].split()[0])
        self._write(entry)
        if doomed:
            os.kill(int(client[1]), signal.SIGKILL)
        start(*status)
        return answer

    def _rudely(
        self, how: str, entry: dict[str, Any], service: str, start: StartResponse
    ) -> Iterable[bytes]:
        """Answers a call that AWS never sees, or will not serve now."""
        self._write(entry)
        if how == "html":
            page = b"<html><body>Welcome! Accept our terms to go on.</body></html>"
            return _answer(start, "200 OK", page, "text/html; charset=utf-8")
        asked = f"{service}:{entry['operation']} on resource: *"
        codes = {
            "expire": ("ExpiredToken", "The provided token has expired."),
            "throttle": (THROTTLES.get(service, "ThrottlingException"), "Rate exceeded"),
            "deny": ("AccessDenied", f"User is not authorized to perform: {asked}"),
            "fault": ("InternalError", "We encountered an internal error"),
        }
        status = {"deny": "403 Forbidden", "fault": "500 Internal Server Error"}.get(
            how, "400 Bad Request"
        )
        return _refusal(service, Refused(*codes[how]), start, status)

    def _write(self, entry: dict[str, Any]) -> None:
        with self._record.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    # --- what tests ask for ---

    def reset(self) -> None:
        self._reset()

    def forget(self) -> None:
        """Removes all jobs, notebooks and instances, and what was remembered of them; what a stack
        has made stays.
        """
        jobs = get_backend("sagemaker")[ACCOUNT][REGION]
        for things in (
            jobs.training_jobs,
            jobs.hyper_parameter_tuning_jobs,
            jobs.notebook_instances,
            jobs.notebook_instance_lifecycle_configurations,
        ):
            things.clear()
        get_backend("ec2")[ACCOUNT][REGION].reservations.clear()
        self._tokens.clear()

    def kill(self, call: int, when: str) -> None:
        """Kills the client at the Nth call from now. when: before or after the call is
        carried out.
        """
        self._kill = {"call": self._number + call, "when": when}

    def refuse(self, operation: str, code: str, message: str = "") -> None:
        """Answers the next call of an operation by an error."""
        self._refuse[operation] = (code, message)
        if not code:  # no longer
            del self._refuse[operation]

    def rude(self, how: str, answers: int, operation: str = "", later: bool = False) -> None:
        """Answers the next so many calls of clients with a name badly.

        how: see `_rudely`. later: only those that ask for more of a listing.
        """
        self._rude += [(how, operation, later)] * answers

    def pages(self, size: int) -> None:
        """Lists so many things in a page, whatever is asked for; 0: as it is."""
        self._page = size

    def left(self) -> dict[str, int]:
        """How many answers are still to be bad."""
        return {"rude": len(self._rude)}

    def calm(self) -> None:
        """Answers as on a good day."""
        self._rude.clear()

    def slow_iam(self, calls: int) -> None:
        """IAM shows no role to the next so many calls that need one."""
        self._slow_iam = calls

    def sold_out(self, what: str, code: str = "InsufficientInstanceCapacity") -> None:
        """RunInstances has nothing that fits. what: a regular expression over a kind of machine,
        its zone or -, and spot or on-demand; "" ends it.
        """
        self._sold_out = {what: code} | (self._sold_out if what else {})
        if not what:
            self._sold_out.clear()

    def ask_price(self, ec2: float, ml: float) -> None:
        """Lets the Price List know these dollars an hour, and no longer the table that ships."""
        self._asked = {"ec2": ec2, "ml": ml}

    def _needs_iam(self) -> bool:
        """Whether this call comes before IAM has told SageMaker and EC2 of the role."""
        self._slow_iam -= self._named
        return self._named and self._slow_iam >= 0

    def late(self, answers: int) -> None:
        """What is made from now on is not there in the first so many answers about it."""
        self._late = answers

    def end_instance(self, instance: str, code: str, message: str = "", hours: float = 0.0) -> None:
        """Terminates an instance so many hours ago, for a reason of AWS's: the code of its
        StateReason.
        """
        found = get_backend("ec2")[ACCOUNT][REGION].get_instance(instance)
        found.terminate()
        found.state_reason.code, found.state_reason.message = code, message or code
        ended = utcnow() - timedelta(hours=hours)
        found._reason = f"Server or user ({ended:%Y-%m-%d %H:%M:%S GMT})"

    def quota(self, number: str, value: float) -> None:
        """Sets a quota of the account, by its number or its name."""
        self._quotas[number] = value

    def close(self) -> None:
        """The default VPC has no way out, until `reset`."""
        self._closed = True

    def age(self, instance: str, hours: float) -> None:
        """Lets an instance have started so many hours ago."""
        get_backend("ec2")[ACCOUNT][REGION].get_instance(instance).launch_time = (
            utcnow() - timedelta(hours=hours)
        )

    def forget_instance(self, instance: str) -> None:
        """What EC2 does an hour after an instance's end."""
        reservations = get_backend("ec2")[ACCOUNT][REGION].reservations
        for key in [key for key, each in reservations.items() if each.instances[0].id == instance]:
            del reservations[key]

    def _made(self, name: str) -> None:
        if self._late:
            self._unseen[name] = self._late

    def _not_yet(self, name: str) -> bool:
        """Whether this answer comes too early for what has that name."""
        if not self._named or not self._unseen.get(name):
            return False
        self._unseen[name] -= 1
        return True

    def starting(self, notebook: str, answers: int) -> None:
        """Lets a notebook start until so many answers have said so."""
        self._starting[notebook] = answers
        get_backend("sagemaker")[ACCOUNT][REGION].notebook_instances[notebook].status = "Pending"

    def busy_groups(self, answers: int) -> None:
        """Lets a placement group count machines that have ended, in the next so many answers."""
        self._busy = answers

    def end(
        self,
        job: str,
        status: str,
        hours: float = 1.0,
        billed: float | None = None,
        metrics: dict[str, float] | None = None,
        why: str = "",
        log: str = "",
    ) -> None:
        """Ends a training job or a tuning job that began so many hours ago.

        why: FailureReason of one that has failed, SecondaryStatus of one that was stopped. log: a
        line that it logs last, which the next answer about its log doesn't have yet.
        """
        backend = get_backend("sagemaker")[ACCOUNT][REGION]
        found = backend.training_jobs.get(job) or backend.hyper_parameter_tuning_jobs[job]
        _set_status(found, status)
        if job in backend.training_jobs:
            found.training_end_time = utcnow()
            found.training_start_time = found.training_end_time - timedelta(hours=hours)
            found.billable_time_in_seconds = billed
            found.final_metric_data_list = [
                {"MetricName": name, "Value": value, "Timestamp": utcnow()}
                for name, value in (metrics or {}).items()
            ]
            if status == "Failed":
                found.failure_reason = why
            elif why:
                found.secondary_status = why
        if log:
            _log(job, log)
            self._silent = 1
        for trial in _trials(found):
            self.end(trial.training_job_name, status, hours, billed, metrics)

    def many(self, bucket: str, objects: dict[str, str], job: str, jobs: dict[str, str]) -> None:
        """Makes many things at once: objects by their keys, and jobs like one that is there, by
        their names, each of a status.
        """
        stored = get_backend("s3")[ACCOUNT]["aws"]
        for key, text in objects.items():
            stored.put_object(bucket, key, text.encode())
        there = get_backend("sagemaker")[ACCOUNT][REGION].training_jobs
        for name, status in jobs.items():
            made = copy.copy(there[job])
            made.training_job_name, made.arn = name, made.arn.replace(job, name)
            there[name] = made
            _set_status(made, status)
            if status != RUNNING:
                self.end(name, status, billed=1800.0)

    # --- where moto is not strict ---

    def _strictly(
        self,
        service: str,
        operation: str,
        parameters: dict[str, Any],
        region: str,
        environ: WSGIEnvironment,
        start: Any,
    ) -> Iterable[bytes]:
        if operation in self._refuse:
            raise Refused(*self._refuse.pop(operation))
        if service == "s3" and self._named:
            _check_owner(operation, parameters)
        own = getattr(self, f"_{operation}", None)
        if own is None:
            return self._moto(environ, start)

        def forward(changed: dict[str, Any] | None = None) -> list[bytes]:
            """Lets moto answer; changed: other parameters, in JSON."""
            if changed is not None:
                body = json.dumps(changed).encode()
                environ.update({"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))})
            return list(self._moto(environ, start))

        return own(parameters, region, forward, start)

    def _CreateTrainingJob(self, parameters, region, forward, start) -> list[bytes]:
        backend = get_backend("sagemaker")[ACCOUNT][region]
        if parameters["TrainingJobName"] in backend.training_jobs:
            raise Refused(
                "ResourceInUse",
                "Training job names must be unique within an AWS account and region, and one of "
                f"{parameters['TrainingJobName']} exists",
            )
        if self._needs_iam():
            raise Refused("ValidationException", f"Could not assume role {parameters['RoleArn']}.")
        _needs(
            parameters["RoleArn"],
            parameters["OutputDataConfig"]["S3OutputPath"],
            parameters["HyperParameters"],
            region,
        )
        answer = forward()
        job = backend.training_jobs[parameters["TrainingJobName"]]
        _set_status(job, RUNNING)
        job.training_end_time = None
        self._made(parameters["TrainingJobName"])
        return answer

    def _CreateHyperParameterTuningJob(self, parameters, region, forward, start) -> list[bytes]:
        definition = parameters["TrainingJobDefinition"]
        _needs(
            definition["RoleArn"],
            definition["OutputDataConfig"]["S3OutputPath"],
            definition["StaticHyperParameters"],
            region,
        )
        backend = get_backend("sagemaker")[ACCOUNT][region]
        name = parameters["HyperParameterTuningJobName"]
        answer = forward()
        tuning = backend.hyper_parameter_tuning_jobs.get(name)
        if tuning is None or f"{name}-001-0123abcd" in backend.training_jobs:
            return answer
        self._made(name)
        backend.create_training_job(  # its first trial
            f"{name}-001-0123abcd", definition["StaticHyperParameters"],
            definition["AlgorithmSpecification"],
            definition["RoleArn"],
            definition.get("InputDataConfig", []), definition["OutputDataConfig"],
            definition["ResourceConfig"], {}, definition["StoppingCondition"],
            parameters["Tags"], False, False, definition.get("EnableManagedSpotTraining", False),
            {}, {}, [], {}, {},
        )  # fmt: skip
        _set_status(tuning, RUNNING)
        tuning.hyper_parameter_tuning_end_time = None
        tuning.training_job_status_counters = {
            "Completed": 0,
            "InProgress": 1,
            "RetryableError": 0,
            "NonRetryableError": 0,
            "Stopped": 0,
        }
        tuning.best_training_job = None
        for trial in _trials(tuning):
            _set_status(trial, RUNNING)
            trial.training_end_time = None
        return answer

    def _DescribeHyperParameterTuningJob(self, parameters, region, forward, start) -> list[bytes]:
        jobs = get_backend("sagemaker")[ACCOUNT][region].hyper_parameter_tuning_jobs
        self._here(parameters["HyperParameterTuningJobName"])
        answer = forward()
        if (
            job := jobs.get(parameters["HyperParameterTuningJobName"])
        ) and job.hyper_parameter_tuning_job_status == "Stopping":
            _set_status(job, "Stopped")
        return answer

    def _here(self, name: str) -> None:
        if self._not_yet(name):
            raise Refused("ValidationException", f"Requested resource {name} not found.")

    def _DescribeTrainingJob(self, parameters, region, forward, start) -> list[bytes]:
        self._here(parameters["TrainingJobName"])
        answer = forward()
        job = get_backend("sagemaker")[ACCOUNT][region].training_jobs.get(
            parameters["TrainingJobName"]
        )
        if job and job.training_job_status == "Stopping":  # it has stopped by the next look
            self.end(parameters["TrainingJobName"], "Stopped")
        return answer

    def _ListTrainingJobs(self, parameters, region, forward, start) -> list[bytes]:
        answer = forward()
        for job in get_backend("sagemaker")[ACCOUNT][region].training_jobs.values():
            if job.training_job_status == "Stopping":
                self.end(job.training_job_name, "Stopped")
        return answer

    def _ListObjectsV2(self, parameters, region, forward, start) -> list[bytes]:
        """Of what a key of KMS's encrypts, the ETag is no MD5."""
        answer = forward()
        bucket = get_backend("s3")[ACCOUNT]["aws"].buckets.get(parameters.get("Bucket", ""))
        if bucket is None or "aws:kms" not in str(bucket.encryption):
            return answer
        text = b"".join(answer)
        return [re.sub(rb"(<ETag>[^<]*?)[0-9a-f]{4}", rb"\1beef", text)]

    def _Search(self, parameters, region, forward, start) -> list[bytes]:
        """In pages, as AWS answers, each job as DescribeTrainingJob has it, with its tags."""
        jobs = get_backend("sagemaker")[ACCOUNT][region].training_jobs.values()
        [wanted] = parameters["SearchExpression"]["Filters"]
        tag = {"Key": wanted["Name"].removeprefix("Tags."), "Value": wanted["Value"]}
        [visible] = parameters["VisibilityConditions"]  # what the policies need
        if visible != {"Key": wanted["Name"], "Value": wanted["Value"]}:
            raise Refused("AccessDeniedException", "not authorized to perform: sagemaker:Search")
        found = [
            job
            for job in jobs
            if tag in job.tags and not (self._named and self._unseen.get(job.training_job_name))
        ]
        first, size = int(parameters.get("NextToken", 0)), parameters.get("MaxResults", 10)
        page = [
            {
                "TrainingJob": job.gen_response_object()
                | {"TrainingJobArn": job.arn, "Tags": job.tags}
            }
            for job in found[first : first + size]
        ]
        answer: dict[str, Any] = {"Results": page}
        if first + size < len(found):
            answer["NextToken"] = str(first + size)
        return _answer(start, "200 OK", json.dumps(answer, default=_unix).encode())

    def _ListHyperParameterTuningJobs(self, parameters, region, forward, start) -> list[bytes]:
        answer = forward()
        for job in get_backend("sagemaker")[ACCOUNT][region].hyper_parameter_tuning_jobs.values():
            if job.hyper_parameter_tuning_job_status == "Stopping":
                _set_status(job, "Stopped")
        return answer

    def _StopTrainingJob(self, parameters, region, forward, start) -> list[bytes]:
        self._here(parameters["TrainingJobName"])
        job = _known(
            get_backend("sagemaker")[ACCOUNT][region].training_jobs, parameters["TrainingJobName"]
        )
        if job.training_job_status != RUNNING:
            raise Refused(
                "ValidationException",
                "The request was rejected because the training job is in status "
                f"{job.training_job_status}.",
            )
        _set_status(job, "Stopping")
        return _answer(start, "200 OK", b"{}")

    def _DeleteTrainingJob(self, parameters, region, forward, start) -> list[bytes]:
        jobs = get_backend("sagemaker")[ACCOUNT][region].training_jobs
        if _known(jobs, parameters["TrainingJobName"]).training_job_status in (RUNNING, "Stopping"):
            raise Refused("ValidationException", "A training job that runs can't be deleted.")
        del jobs[parameters["TrainingJobName"]]
        return _answer(start, "200 OK", b"{}")

    def _StopHyperParameterTuningJob(self, parameters, region, forward, start) -> list[bytes]:
        job = _known(
            get_backend("sagemaker")[ACCOUNT][region].hyper_parameter_tuning_jobs,
            parameters["HyperParameterTuningJobName"],
        )
        _set_status(job, "Stopping")
        for trial in _trials(job):
            _set_status(trial, "Stopping")
        return _answer(start, "200 OK", b"{}")

    def _ListTrainingJobsForHyperParameterTuningJob(
        self, parameters, region, forward, start
    ) -> list[bytes]:
        job = _known(
            get_backend("sagemaker")[ACCOUNT][region].hyper_parameter_tuning_jobs,
            parameters["HyperParameterTuningJobName"],
        )
        summaries = [
            {
                "TrainingJobName": trial.training_job_name,
                "TrainingJobArn": trial.arn,
                "CreationTime": trial.creation_time.timestamp(),
                "TrainingStartTime": trial.training_start_time.timestamp(),
                "TrainingJobStatus": trial.training_job_status,
                "TunedHyperParameters": {},
            }
            | (
                {"TrainingEndTime": trial.training_end_time.timestamp()}
                if trial.training_end_time
                else {}
            )
            for trial in _trials(job)
        ]
        return _answer(start, "200 OK", json.dumps({"TrainingJobSummaries": summaries}).encode())

    def _CreateNotebookInstance(self, parameters, region, forward, start) -> list[bytes]:
        backend = get_backend("sagemaker")[ACCOUNT][region]
        _known(
            backend.notebook_instance_lifecycle_configurations, parameters["LifecycleConfigName"]
        )
        _role(parameters["RoleArn"])
        self._made(parameters["NotebookInstanceName"])
        return forward()

    def _UpdateNotebookInstance(self, parameters, region, forward, start) -> list[bytes]:
        notebooks = get_backend("sagemaker")[ACCOUNT][region].notebook_instances
        notebook = _known(notebooks, parameters["NotebookInstanceName"])
        if notebook.status != "Stopped":
            raise Refused("ValidationException", f"Status ({notebook.status}) not in ([Stopped]).")
        notebook.instance_type = parameters.get("InstanceType", notebook.instance_type)
        size = parameters.get("VolumeSizeInGB", notebook.volume_size_in_gb)
        notebook.volume_size_in_gb = size
        return _answer(start, "200 OK", b"{}")

    def _UpdateNotebookInstanceLifecycleConfig(
        self, parameters, region, forward, start
    ) -> list[bytes]:
        scripts = get_backend("sagemaker")[ACCOUNT][
            region
        ].notebook_instance_lifecycle_configurations
        script = _known(scripts, parameters["NotebookInstanceLifecycleConfigName"])
        script.on_create, script.on_start = parameters["OnCreate"], parameters["OnStart"]
        return _answer(start, "200 OK", b"{}")

    def _CreatePresignedNotebookInstanceUrl(
        self, parameters, region, forward, start
    ) -> list[bytes]:
        name = parameters["NotebookInstanceName"]
        _known(get_backend("sagemaker")[ACCOUNT][region].notebook_instances, name)
        url = f"https://{name}.notebook.{region}.sagemaker.aws?authToken=x"
        return _answer(start, "200 OK", json.dumps({"AuthorizedUrl": url}).encode())

    def _DescribeNotebookInstance(self, parameters, region, forward, start) -> list[bytes]:
        if self._not_yet(parameters["NotebookInstanceName"]):
            raise Refused("ValidationException", "RecordNotFound")
        return forward()

    def _ListNotebookInstances(self, parameters, region, forward, start) -> list[bytes]:
        notebooks = get_backend("sagemaker")[ACCOUNT][region].notebook_instances
        for name, left in list(self._starting.items()):
            self._starting[name] = left - 1
            if left == 0:
                notebooks[name].status = "InService"
                del self._starting[name]
        return forward()

    def _StopNotebookInstance(self, parameters, region, forward, start) -> list[bytes]:
        notebooks = get_backend("sagemaker")[ACCOUNT][region].notebook_instances
        status = _known(notebooks, parameters["NotebookInstanceName"]).status
        if status != "InService":
            raise Refused("ValidationException", f"Status ({status}) not in ([InService]).")
        return forward()

    def _CreateNotebookInstanceLifecycleConfig(
        self, parameters, region, forward, start
    ) -> list[bytes]:
        answer = forward()
        scripts = get_backend("sagemaker")[ACCOUNT][
            region
        ].notebook_instance_lifecycle_configurations
        name = parameters["NotebookInstanceLifecycleConfigName"]
        if name in scripts:
            self._script_tags.setdefault(scripts[name].arn, parameters.get("Tags", []))
        return answer

    def _ListTags(self, parameters, region, forward, start) -> list[bytes]:
        """Of what is gone there are none; moto ends in an error of its own."""
        backend = get_backend("sagemaker")[ACCOUNT][region]
        kind, _, name = parameters.get("ResourceArn", "").rpartition(":")[2].partition("/")
        things = {
            "training-job": backend.training_jobs,
            "hyper-parameter-tuning-job": backend.hyper_parameter_tuning_jobs,
            "notebook-instance": backend.notebook_instances,
        }
        if kind in things:
            _known(things[kind], name)
        if ":notebook-instance-lifecycle-config/" not in parameters.get("ResourceArn", ""):
            return forward()
        return _answer(
            start,
            "200 OK",
            json.dumps({"Tags": self._script_tags[parameters["ResourceArn"]]}).encode(),
        )

    def _ListNotebookInstanceLifecycleConfigs(
        self, parameters, region, forward, start
    ) -> list[bytes]:
        scripts = get_backend("sagemaker")[ACCOUNT][
            region
        ].notebook_instance_lifecycle_configurations
        found = [
            {
                "NotebookInstanceLifecycleConfigName": name,
                "NotebookInstanceLifecycleConfigArn": script.arn,
            }
            for name, script in scripts.items()
            if parameters.get("NameContains", "") in name
        ]
        return _answer(
            start, "200 OK", json.dumps({"NotebookInstanceLifecycleConfigs": found}).encode()
        )

    def _CreateChangeSet(self, parameters, region, forward, start) -> list[bytes]:
        backend = get_backend("cloudformation")[ACCOUNT][region]
        stacks = {stack.name: stack.status for stack in backend.stacks.values()}
        name, stack = parameters["ChangeSetName"], parameters["StackName"]
        if parameters["ChangeSetType"] == "CREATE" and stack in stacks:
            raise Refused(
                "ValidationError",
                f"Stack [{stack}] already exists and cannot be created again with the "
                f"changeSet [{name}].",
            )
        if any(
            each.change_set_name == name and each.stack.name == stack
            for each in backend.change_sets.values()
        ):
            raise Refused(
                "AlreadyExistsException",
                f"ChangeSet {name} cannot be created due to a mismatch with existing attribute",
            )
        return forward()

    def _DeleteStack(self, parameters, region, forward, start) -> list[bytes]:
        """Takes managed policies and change sets along, which moto leaves."""
        backend = get_backend("cloudformation")[ACCOUNT][region]
        found = [
            stack for stack in backend.stacks.values() if stack.name == parameters["StackName"]
        ]
        policies = get_backend("iam")[ACCOUNT]["aws"].managed_policies
        made = {
            resource.arn
            for stack in found
            for resource in stack.resource_map.values()
            if isinstance(resource, ManagedPolicy)
        }
        answer = forward()
        for arn in made & policies.keys():
            del policies[arn]
        for key in [key for key, change in backend.change_sets.items() if change.stack in found]:
            del backend.change_sets[key]
        return answer

    def _ExecuteChangeSet(self, parameters, region, forward, start) -> list[bytes]:
        backend = get_backend("cloudformation")[ACCOUNT][region]
        found = [
            each
            for each in backend.change_sets.values()
            if each.change_set_name == parameters["ChangeSetName"]
        ]
        if not found or found[0].execution_status != "AVAILABLE":
            raise Refused(
                "InvalidChangeSetStatus",
                f"ChangeSet {parameters['ChangeSetName']} cannot be executed in its current status",
            )
        answer = forward()
        backend.change_sets.clear()  # as AWS does: they are of no use for the stack as it is now
        return answer

    def _RunInstances(self, parameters, region, forward, start) -> list[bytes]:
        token = parameters.get("ClientToken", "")
        content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
        if not token:
            raise Refused("MissingParameter", "this project's requests carry a ClientToken")
        if token in self._tokens:
            before, answer = self._tokens[token]
            if before != content:
                raise Refused(
                    "IdempotentParameterMismatch",
                    "The request uses the same client token as a previous, but non-identical "
                    f"request: {token}",
                )
            return _answer(start, "200 OK", b"".join(answer), "text/xml")
        if len(base64.b64decode(parameters.get("UserData", ""))) > 16384:
            raise Refused("InvalidParameterValue", "User data is limited to 16384 bytes")
        if parameters["IamInstanceProfile.Name"] not in {
            each.name for each in get_backend("iam")[ACCOUNT]["aws"].instance_profiles.values()
        }:
            raise Refused(
                "InvalidParameterValue",
                f"Value ({parameters['IamInstanceProfile.Name']}) for parameter "
                "iamInstanceProfile.name is invalid",
            )
        if self._needs_iam():
            raise Refused(
                "InvalidParameterValue",
                f"Value ({parameters['IamInstanceProfile.Name']}) for parameter "
                "iamInstanceProfile.name is invalid. Invalid IAM Instance Profile name",
            )
        self._check_capacity(parameters)
        group = parameters.get("Placement.GroupName")
        if group is not None:
            self._check_group(group)
        answer = forward()
        self._tokens[token] = (content, answer)
        found = re.findall(r"<instanceId>(i-\w+)</instanceId>", b"".join(answer).decode())
        if found:
            self._made(found[0])
            self._grouped.setdefault(group or "", []).extend(found)
        return answer

    def _check_capacity(self, parameters: dict[str, Any]) -> None:
        """Refuses what is sold out: of several machines all, where one is."""
        market = parameters.get("InstanceMarketOptions.MarketType", "on-demand")
        zone = parameters.get("Placement.AvailabilityZone", "-")
        asked = f"{parameters['InstanceType']} {zone} {market}"
        for what, code in self._sold_out.items():
            if re.fullmatch(what, asked):
                raise Refused(code, f"We currently do not have sufficient capacity: {asked}")

    def _CreatePlacementGroup(self, parameters, region, forward, start) -> list[bytes]:
        name = parameters["GroupName"]
        if name in self._groups:
            raise Refused(
                "InvalidPlacementGroup.Duplicate", f"The Placement Group '{name}' already exists."
            )
        tag = r"TagSpecification\.1\.Tag\.\d+\.Key"
        given = [key for key in parameters if re.fullmatch(tag, key)]
        self._groups[name] = {
            parameters[key]: parameters[key.removesuffix("Key") + "Value"] for key in given
        }
        return _xml(start, "CreatePlacementGroup", "<return>true</return>")

    def _DescribePlacementGroups(self, parameters, region, forward, start) -> list[bytes]:
        key, value = (
            parameters["Filter.1.Name"].removeprefix("tag:"),
            parameters["Filter.1.Value.1"],
        )
        found = "".join(
            f"<item><groupName>{name}</groupName><strategy>cluster</strategy></item>"
            for name, tags in self._groups.items()
            if tags.get(key) == value
        )
        body = f"<placementGroupSet>{found}</placementGroupSet>"
        return _xml(start, "DescribePlacementGroups", body)

    def _DeletePlacementGroup(self, parameters, region, forward, start) -> list[bytes]:
        name = parameters["GroupName"]
        self._check_group(name)
        self._busy -= 1
        if self._busy >= 0 or any(_is_alive(each) for each in self._in_group(name, region)):
            raise Refused("InvalidPlacementGroup.InUse", f"The placement group '{name}' is in use.")
        del self._groups[name]
        return _xml(start, "DeletePlacementGroup", "<return>true</return>")

    def _check_group(self, name: str) -> None:
        if name not in self._groups:
            raise Refused(
                "InvalidPlacementGroup.Unknown", f"The Placement Group '{name}' is unknown."
            )

    def _in_group(self, name: str, region: str) -> list[Any]:
        reservations = get_backend("ec2")[ACCOUNT][region].reservations.values()
        return [
            each
            for group in reservations
            for each in group.instances
            if each.id in self._grouped.get(name, ())
        ]

    def _DescribeInstances(self, parameters, region, forward, start) -> list[bytes]:
        reservations = get_backend("ec2")[ACCOUNT][region].reservations
        early = [key for key, each in reservations.items() if self._not_yet(each.instances[0].id)]
        hidden = {key: reservations.pop(key) for key in early}
        try:
            return forward()
        finally:
            reservations.update(hidden)

    def _TerminateInstances(self, parameters, region, forward, start) -> list[bytes]:
        for name, value in parameters.items():
            if name.startswith("InstanceId.") and self._not_yet(value):
                raise Refused(
                    "InvalidInstanceID.NotFound", f"The instance ID '{value}' does not exist"
                )
        return forward()

    def _GetParameter(self, parameters, region, forward, start) -> list[bytes]:
        if not parameters["Name"].startswith(DLAMI):
            return forward()
        images = sorted(get_backend("ec2")[ACCOUNT][region].amis)
        value = {"Name": parameters["Name"], "Type": "String", "Value": images[0], "Version": 1}
        return _answer(start, "200 OK", json.dumps({"Parameter": value}).encode())

    def _FilterLogEvents(self, parameters, region, forward, start) -> list[bytes]:
        """Heeds the streams' prefix, which moto does not."""
        if self._silent:
            self._silent -= 1
            return _answer(start, "200 OK", b'{"events": []}')
        group = get_backend("logs")[ACCOUNT][region].groups.get(parameters["logGroupName"])
        if group is None:
            return forward()
        named = [
            name for name in group.streams if name.startswith(parameters["logStreamNamePrefix"])
        ]
        return (
            forward(parameters | {"logStreamNames": named})
            if named
            else _answer(start, "200 OK", b'{"events": []}')
        )

    def _DescribeRouteTables(self, parameters, region, forward, start) -> list[bytes]:
        """The default VPC has a way to the internet, as AWS makes it and moto doesn't."""
        backend = get_backend("ec2")[ACCOUNT][region]
        [vpc] = [each for each in backend.vpcs.values() if each.is_default]
        [table] = [
            each
            for each in backend.route_tables.values()
            if each.vpc_id == vpc.id and each.main_association_id
        ]
        if len(table.routes) == 1 and not self._closed:
            gateway = backend.create_internet_gateway()
            backend.attach_internet_gateway(gateway.id, vpc.id)
            backend.create_route(table.id, "0.0.0.0/0", gateway_id=gateway.id)
        return forward()

    def _DescribeSecurityGroups(self, parameters, region, forward, start) -> list[bytes]:
        """A VPC's default group lets its own members in, as AWS makes it and moto doesn't."""
        backend = get_backend("ec2")[ACCOUNT][region]
        for group in backend.describe_security_groups(filters={"group-name": ["default"]}):
            if not group.ingress_rules:
                own = [{"GroupId": group.id}]
                backend.authorize_security_group_ingress(
                    group.id, "-1", "-1", "-1", [], source_groups=own
                )
        return forward()

    def _DescribeSpotPriceHistory(self, parameters, region, forward, start) -> list[bytes]:
        """A price that a spot machine may have, as long as moto's, of which nobody pays any."""
        return [part.replace(b"0.00001", b"0.21040") for part in forward()]

    def _GetSpotPlacementScores(self, parameters, region, forward, start) -> list[bytes]:
        """Of the region, or of some of its zones where a single one is asked for."""
        scores = f"<item><region>{region}</region><score>7</score></item>"
        if parameters.get("SingleAvailabilityZone") == "true":
            scores = "".join(
                f"<item><region>{region}</region><availabilityZoneId>use1-az{number}"
                f"</availabilityZoneId><score>{score}</score></item>"
                for number, score in ((1, 3), (2, 9), (4, 1))
            )
        answer = (
            '<GetSpotPlacementScoresResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
            f"<requestId>1</requestId><spotPlacementScoreSet>{scores}</spotPlacementScoreSet>"
            "</GetSpotPlacementScoresResponse>"
        )
        return _answer(start, "200 OK", answer.encode(), "text/xml")

    def _GetServiceQuota(self, parameters, region, forward, start) -> list[bytes]:
        """Of what was never asked for, AWS has no value of its own here."""
        number = parameters["QuotaCode"]
        name = dict(LISTED_QUOTAS).get(number, number)
        if name == number and number not in self._quotas:
            raise Refused("NoSuchResourceException", "The request failed because it does not exist")
        quota = {"QuotaCode": number, "QuotaName": name, "Value": self._quotas.get(name, 4.0)}
        return _answer(start, "200 OK", json.dumps({"Quota": quota}).encode())

    def _GetAWSDefaultServiceQuota(self, parameters, region, forward, start) -> list[bytes]:
        quota = {"QuotaCode": parameters["QuotaCode"], "Value": 64.0}
        return _answer(start, "200 OK", json.dumps({"Quota": quota}).encode())

    def _ListServiceQuotas(self, parameters, region, forward, start) -> list[bytes]:
        """In pages, as AWS lists the thousands of SageMaker's."""
        first = int(parameters.get("NextToken", 0))
        page = [
            {"QuotaName": name, "QuotaCode": number, "Value": self._quotas.get(name, 4.0)}
            for number, name in LISTED_QUOTAS[first : first + 8]
        ]
        answer: dict[str, Any] = {"Quotas": page}
        if first + 8 < len(LISTED_QUOTAS):
            answer["NextToken"] = str(first + 8)
        return _answer(start, "200 OK", json.dumps(answer).encode())

    def _GetProducts(self, parameters, region, forward, start) -> list[bytes]:
        wanted = {each["Field"]: each["Value"] for each in parameters["Filters"]}
        name = wanted.get("instanceName") or wanted["instanceType"]
        if not self._asked and name in PRICES:
            hour = PRICES[name]
        else:
            hour = (self._asked or {"ml": 0.9, "ec2": 0.6})["ml" if name[:3] == "ml." else "ec2"]
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": f"{hour:.10f}"}}
        product = {
            "product": {"attributes": wanted},
            "terms": {"OnDemand": {"T": {"priceDimensions": {"D": dimension}}}},
        }
        return _answer(
            start,
            "200 OK",
            json.dumps({"FormatVersion": "aws_v1", "PriceList": [json.dumps(product)]}).encode(),
        )


def _lent() -> dict[str, Any]:
    """Return credentials that are renewed with each call: they are about to expire."""
    soon = utcnow().timestamp() + 60
    names = ("accessKeyId", "secretAccessKey", "sessionToken")
    return dict.fromkeys(names, "testing") | {"expiration": round(1000 * soon)}


def _needs(role: str, output: str, parameters: dict[str, str], region: str) -> None:
    """Refuses a job whose role, bucket or code is not there."""
    _role(role)
    buckets = get_backend("s3")[ACCOUNT]["aws"].buckets
    for uri in (
        output,
        *(
            [json.loads(parameters["sagemaker_submit_directory"])]
            if "sagemaker_submit_directory" in parameters
            else []
        ),
    ):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if bucket not in buckets or (key.endswith(".tar.gz") and key not in buckets[bucket].keys):
            raise Refused("ValidationException", f"No S3 objects found under S3 URL {uri}")


def _role(arn: str) -> None:
    if arn not in {role.arn for role in get_backend("iam")[ACCOUNT]["aws"].roles.values()}:
        raise Refused(
            "ValidationException",
            f"Could not assume role {arn}. Please ensure that the role exists",
        )


def _known(things: dict[str, Any], name: str) -> Any:
    if name not in things:
        raise Refused("ValidationException", f"Requested resource {name} not found.")
    return things[name]


def _set_status(job: Any, status: str) -> None:
    for attribute in ("training_job_status", "hyper_parameter_tuning_job_status"):
        if hasattr(job, attribute):
            setattr(job, attribute, status)
    if hasattr(job, "secondary_status"):
        job.secondary_status = "Training" if status == RUNNING else status


def _log(job: str, line: str) -> None:
    """Lets a training job log a line."""
    logs, group, stream = get_backend("logs")[ACCOUNT][REGION], TRAINING_GROUP, f"{job}/algo-1"
    if group not in logs.groups:
        logs.create_log_group(group, {})
    if stream not in logs.groups[group].streams:
        logs.create_log_stream(group, stream)
    event = {"timestamp": int(1000 * utcnow().timestamp()), "message": line}
    logs.put_log_events(group, stream, [event])


def _trials(job: Any) -> list[Any]:
    name = getattr(job, "hyper_parameter_tuning_job_name", None)
    jobs = get_backend("sagemaker")[ACCOUNT][REGION].training_jobs.values()
    return [
        trial
        for trial in jobs
        if name is not None and trial.training_job_name.startswith(f"{name}-")
    ]


def _unix(value: Any) -> float:
    """A time as JSON has it."""
    return float(value.timestamp())


# --- the wire ---


def _answer(
    start: Any, status: str, body: bytes, kind: str = "application/x-amz-json-1.1"
) -> list[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]


def _xml(start: Any, operation: str, body: str) -> list[bytes]:
    """An answer of EC2's."""
    text = (
        f'<{operation}Response xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
        f"<requestId>1</requestId>{body}</{operation}Response>"
    )
    return _answer(start, "200 OK", text.encode(), "text/xml")


def _is_alive(instance: Any) -> bool:
    return instance.state in ("pending", "running", "shutting-down")


def _check_owner(operation: str, parameters: dict[str, Any]) -> None:
    """Refuse a call to a bucket whose name can be guessed, and that doesn't say whose it is."""
    guessed = re.search(rf"-{ACCOUNT}-[a-z0-9-]+$", parameters.get("Bucket", ""))
    makes = operation == "CreateBucket"
    if guessed and not makes and parameters.get("ExpectedBucketOwner") != ACCOUNT:
        raise Refused("AccessDenied", f"{operation}: no ExpectedBucketOwner")


def _refusal(
    service: str, refusal: Refused, start: Any, status: str = "400 Bad Request"
) -> list[bytes]:
    """An error in the form of the service's protocol."""
    code, message = refusal.code, refusal.message or refusal.code
    if service == "ec2":
        error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        text = f"<Response><Errors>{error}</Errors><RequestID>1</RequestID></Response>"
    elif service in ("s3", "sts", "iam", "cloudformation"):
        inner = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        text = (
            inner
            if service == "s3"
            else f"<ErrorResponse>{inner}<RequestId>1</RequestId></ErrorResponse>"
        )
    else:
        return _answer(start, status, json.dumps({"__type": code, "message": message}).encode())
    return _answer(start, status, text.encode(), "text/xml")


def _in_pages(
    environ: WSGIEnvironment, service: str, operation: str, parameters: dict[str, Any], size: int
) -> dict[str, Any]:
    """Return a listing's parameters with so many things a page, which its request then asks for."""
    name = _limit(service, operation)
    if name is None:
        return parameters
    body = environ["wsgi.input"].read()
    if service == "s3":
        environ["QUERY_STRING"] += f"&max-keys={size}"
    elif service == "ec2":
        body += f"&{name}={size}".encode()
    else:
        body = json.dumps(parameters | {name: size}).encode()
    environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
    return parameters | {name: size}


@cache
def _limit(service: str, operation: str) -> str | None:
    """Return the parameter of an operation that says how long a page is, by botocore's model."""
    session = botocore.session.get_session()
    try:
        limit = session.get_paginator_model(service).get_paginator(operation).get("limit_key")
    except (ValueError, botocore.exceptions.DataNotFoundError):
        return None
    return None if limit is None else str(limit)


def understand(environ: WSGIEnvironment, body: bytes) -> tuple[str, str, str, dict[str, Any]]:
    """A request's service, region, operation and parameters."""
    credential = re.search(
        r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", "")
    )
    region, service = (credential[1], credential[2]) if credential else ("", "s3")
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        return service, region, target.rpartition(".")[2], json.loads(body or b"{}")
    form = (
        dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
        if environ["REQUEST_METHOD"] == "POST"
        else {}
    )
    if "Action" in form:
        return (
            service,
            region,
            form["Action"],
            {key: value for key, value in form.items() if key not in ("Action", "Version")},
        )
    return service, region, *_rest(service, environ, body)


def _rest(service: str, environ: WSGIEnvironment, body: bytes) -> tuple[str, dict[str, Any]]:
    """Operation and parameters of a REST call: the operation of botocore's model that needs most of
    what is there.
    """
    path, query = (
        environ["PATH_INFO"],
        dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)),
    )
    found: list[tuple[int, str, dict[str, Any]]] = []
    for operation, pattern, fixed in _rest_operations(service, environ["REQUEST_METHOD"]):
        match = pattern.fullmatch(path.rstrip("/") or "/")
        if not match or any(query.get(name) != value for name, value in fixed.items()):
            continue
        parameters: dict[str, Any] = {
            name: unquote(value) for name, value in match.groupdict().items()
        }
        members, shape = (
            operation.input_shape.members.items() if operation.input_shape else (),
            operation.input_shape,
        )
        for name, member in members:
            place, wire = (
                member.serialization.get("location"),
                member.serialization.get("name", name),
            )
            if place == "querystring" and wire in query:
                parameters[name] = query[wire]
            header = environ.get(f"HTTP_{wire.upper().replace('-', '_')}")
            if place == "header" and header is not None:
                parameters[name] = header
        required = set(shape.required_members) if shape else set()
        elsewhere = (
            {name for name in required if shape.members[name].serialization.get("location") is None}
            if shape
            else set()
        )
        if required - elsewhere <= parameters.keys():
            found.append((2 * len(fixed) + len(required), operation.name, parameters))
    if not found:
        return "?", {"path": path, "query": query}
    _, name, parameters = max(found, key=lambda each: each[0])
    if name == "DeleteObjects":
        parameters["Keys"] = re.findall(r"<Key>([^<]*)</Key>", body.decode())
    elif service != "s3" and body[:1] == b"{":
        parameters |= json.loads(body)
    return name, parameters


@cache
def _rest_operations(
    service: str, method: str
) -> list[tuple[OperationModel, re.Pattern[str], dict[str, str]]]:
    session = botocore.session.get_session()
    names = {"monitoring": "cloudwatch", "access-analyzer": "accessanalyzer"}  # as they sign
    model = session.get_service_model(names.get(service, service))
    found = []
    for name in model.operation_names:
        operation = model.operation_model(name)
        if operation.http.get("method") == method:
            path, _, query = operation.http["requestUri"].partition("?")
            pattern = re.sub(
                r"\\\{(\w+)(\\\+)?\\\}",
                lambda part: f"(?P<{part[1]}>{'.+' if part[2] else '[^/]+'})",
                re.escape(path.rstrip("/") or "/"),
            )
            found.append(
                (operation, re.compile(pattern), dict(parse_qsl(query, keep_blank_values=True)))
            )
    return found


def outlive_stacks() -> None:
    """Lets what a stack's template retains stay when an update drops it, as CloudFormation does and
    moto when it deletes the whole stack.
    """
    delete = ResourceMap._delete_resource

    def delete_unless_retained(self: ResourceMap, resource: Any, template: dict[str, Any]) -> None:
        if template.get("DeletionPolicy") != "Retain":
            delete(self, resource, template)

    ResourceMap._delete_resource = delete_unless_retained


def add_what_was_never_made() -> None:
    """Lets an update add a resource whose condition was false until now, as CloudFormation does.

    moto changes it, although there is none.
    """
    diff = ResourceMap.build_resource_diff

    def diff_of_what_there_is(
        self: ResourceMap, template: dict[str, Any], parameters: dict[str, Any] | None = None
    ) -> dict[str, list[str]]:
        names = diff(self, template, parameters)
        never_made = [name for name in names["Modify"] if name not in self._parsed_resources]
        names["Modify"] = [name for name in names["Modify"] if name not in never_made]
        names["Add"] += never_made  # made where its condition is true then
        return names

    ResourceMap.build_resource_diff = diff_of_what_there_is


def update_log_group(
    original_resource: LogGroup,
    new_resource_name: str,
    cloudformation_json: dict[str, Any],
    account_id: str,
    region_name: str,
) -> LogGroup:
    """What moto lacks: a log group in a stack that changes."""
    original_resource.retention_in_days = cloudformation_json["Properties"].get("RetentionInDays")
    return original_resource


def complete() -> None:
    """What moto's CloudFormation is completed by."""
    outlive_stacks()
    add_what_was_never_made()
    LogGroup.update_from_cloudformation_json = staticmethod(update_log_group)


def main() -> None:
    complete()
    moto = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1",
        0,
        Strict(moto, Path(sys.argv[1])),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
