"""What to do about each refusal of AWS that a user may meet: one table, by AWS's error code.

The codes are from AWS's documentation: EC2's and S3's "Error codes", the "Common errors" of IAM,
STS, CloudFormation and SageMaker, as of November 2026.
"""

import re
from dataclasses import dataclass

from trainer.common.console import command

DENIED = "AccessDenied(Exception)?|UnauthorizedOperation|UnauthorizedAccess|AllAccessDisabled|403"
NO_CAPACITY = (
    "InsufficientInstanceCapacity|InsufficientCapacity|CapacityError|InsufficientHostCapacity"
    "|SpotMaxPriceTooLow"
)
# After these, another instance type, zone or way of buying may still be available.
NOT_THIS_ONE = (
    f"{NO_CAPACITY}|Unsupported|VcpuLimitExceeded|InstanceLimitExceeded|ResourceLimitExceeded"
    "|MaxSpotInstanceCountExceeded"
)
CREDENTIALS = "sign in (aws sso login, aws configure), or name a profile in AWS_PROFILE"
NO_REGION = (
    "no AWS region is set: set AWS_REGION, or give one, such as target.region=us-east-1 "
    "(python -m serving: --region us-east-1)"
)
CLOCK = "compare this machine's clock with the time (date -u), and set it right (sudo ntpdate -u)"
QUOTAS = (
    "ask for more at https://console.aws.amazon.com/servicequotas (new accounts start with 0 "
    "GPUs; python -m launch plan names the quota), or choose another instance type"
)
OPT_IN = (
    "or the region is not enabled for this account: aws account enable-region --region-name "
    "REGION, or choose another region"
)
UP = "python -m launch up"
LATER = "start the same command again later"
NO_DEFAULT_SUBNET = (
    "name a subnet that can reach S3: target.subnet=subnet-..., or create the default one "
    "again: aws ec2 create-default-"
)


@dataclass(frozen=True)
class Refusal:
    """What AWS answers, and what to do."""

    code: str  # a regular expression that matches all of AWS's code
    remedy: str
    says: str = ""  # a regular expression that matches in AWS's message
    passes: bool = False  # whether it ends by itself, or when the user signs in again


# The first that fits counts.
REFUSALS = (
    # ---- who asks
    Refusal(
        "ExpiredToken(Exception)?|TokenRefreshRequired|ExpiredTokenId",
        f"the credentials have expired: {CREDENTIALS}",
        passes=True,
    ),
    Refusal(
        "RequestExpired|RequestTimeTooSkewed|RequestInTheFuture",
        f"the session has expired, or this machine's clock is wrong: {CREDENTIALS}, and {CLOCK}",
        passes=True,
    ),
    Refusal(
        "SignatureDoesNotMatch|InvalidSignature(Exception)?|AuthFailure",
        f"this machine's clock is wrong: {CLOCK}",
        says="(?i)expired|not yet current|too skewed|future",
        passes=True,
    ),
    Refusal(
        "SignatureDoesNotMatch|InvalidSignature(Exception)?",
        f"the secret key does not belong to the key's id: {CREDENTIALS}; else {CLOCK}",
    ),
    Refusal(
        "InvalidClientTokenId|UnrecognizedClient(Exception)?|AuthFailure|InvalidAccessKeyId"
        "|InvalidToken",
        f"AWS does not know these credentials there: {CREDENTIALS}, {OPT_IN}",
    ),
    Refusal(
        "AccessDenied(Exception)?",
        "the MFA code was wrong or used already: wait for the next one, "
        "and start the same command again",
        says="(?i)multifactorauthentication",
    ),
    Refusal(
        "RegionDisabledException|InvalidRegion",
        "the region is not enabled for this account: aws account enable-region --region-name "
        "REGION, or choose another region",
    ),
    Refusal(
        "OptInRequired",
        "accept the image's terms once, on the page that the message names, or take AWS's own "
        "image: leave target.image out",
        says="(?i)marketplace|accept terms",
    ),
    Refusal(
        "OptInRequired|SubscriptionRequiredException|NotSignedUp",
        "the account is not yet activated for this service (a new one takes up to 24 hours, and a "
        f"card), {OPT_IN}",
    ),
    Refusal(
        "PendingVerification",
        "AWS is still verifying this account for the region: it takes minutes, at most 4 "
        f"hours, and AWS sends an e-mail when it is done; {LATER}",
    ),
    Refusal(
        "Blocked|AccountProblem|AccountSuspended",
        "AWS has blocked this account (an open bill, or a check): "
        "its e-mails and https://console.aws.amazon.com/support say why",
    ),
    # ---- who may
    Refusal(
        DENIED,
        "a policy of the organization forbids it, whatever this account allows: "
        "ask who administers the organization",
        says="(?i)service control policy|resource control policy|organization",
    ),
    Refusal(
        DENIED,
        "the permissions boundary of this user or role does not allow it: "
        "ask who administers the account to widen it",
        says="(?i)permissions boundary",
    ),
    Refusal(
        DENIED,
        "the key's policy doesn't allow it: give the training role and yourself "
        "kms:GenerateDataKey and kms:Decrypt there, or leave target.kms_key out",
        says="kms:",
    ),
    # ---- no such machine
    Refusal(
        "SpotMaxPriceTooLow",
        "spot machines cost more than that now: target.spot=false, or later",
    ),
    Refusal(
        "MaxSpotInstanceCountExceeded",
        "the account's quota of spot machines, which is separate from that on demand, is too "
        f"small: {QUOTAS}, or target.spot=false",
    ),
    Refusal(
        "Unsupported",
        "the zone doesn't have this machine: name a subnet in one of the zones that the "
        "message names, target.subnet=subnet-..., or choose another instance type",
        says="Availability Zone",
    ),
    Refusal(
        "Unsupported|UnsupportedOperation",
        "the region doesn't have this machine, or not with these settings: aws ec2 "
        "describe-instance-type-offerings lists its machines; choose another instance type",
    ),
    Refusal(
        NO_CAPACITY,
        "AWS has no such machine free there now: start the same command again later, or "
        "choose another instance type or region",
    ),
    Refusal(
        "ResourceLimitExceeded|VcpuLimitExceeded",
        "this quota is 0, as in a new account, or where the region doesn't have the machine: "
        "ask for more at https://console.aws.amazon.com/servicequotas (where it is not "
        "listed, there is no such machine), or choose another instance type",
        says="(?i) is 0 |limit of 0 ",
    ),
    Refusal(
        "VcpuLimitExceeded|InstanceLimitExceeded|ResourceLimitExceeded",
        f"the account's quota is too small: {QUOTAS}",
    ),
    Refusal(
        "AccountLimitExceeded(Exception)?",
        "the account's quota of builds at the same time (CodeBuild) is used up, or 0, as in a new "
        "account: ask for more at https://console.aws.amazon.com/servicequotas (AWS CodeBuild)",
    ),
    Refusal(
        "LimitExceeded(Exception)?",
        "the account has reached its limit of these: delete what is no longer used, or ask "
        "for more at https://console.aws.amazon.com/servicequotas",
    ),
    Refusal(
        "InvalidParameterValue|ValidationException",
        "AWS does not know this instance type there: python -m launch instances lists some; "
        "choose another target.instance_type",
        says="(?i)instance ?type",
    ),
    Refusal(
        "OperationNotPermitted",
        "the machine is protected from being ended: aws ec2 modify-instance-attribute "
        "--no-disable-api-termination --instance-id ID, then start the same command again",
        says="(?i)disableApiTermination",
    ),
    # ---- the foundation
    Refusal(
        "ValidationException|InvalidParameterValue",
        "IAM needs some seconds to show a new role everywhere, but didn't show this one for "
        f"a minute: if there is no foundation, make it: {UP}",
        says="(?i)could not assume role|instance profile|iamInstanceProfile",
    ),
    Refusal("NoSuchBucket", f"there is no foundation here, which has the bucket: {UP}"),
    Refusal(
        "EntityAlreadyExists|BucketAlreadyExists|BucketAlreadyOwnedByYou",
        "this name is taken, by another project or by an older version: choose another, "
        "target.project=NAME, or delete what has it",
    ),
    Refusal(
        "DeleteConflict",
        "something that Packhorse didn't make is still attached to it: the message names it; "
        "detach it, then start the same command again",
    ),
    Refusal(
        "AlreadyExistsException|OperationInProgressException|ResourceInUse(Exception)?"
        "|OperationAborted|ConflictException|ConcurrentModification(Exception)?",
        f"another command is changing the same thing now: wait until it is done, then {LATER}",
    ),
    Refusal(
        "ValidationError",
        f"another command is changing the same stack now: wait until it is done, then {LATER}",
        says="already exists and cannot be created again|_IN_PROGRESS",
    ),
    Refusal(
        "InsufficientCapabilities(Exception)?|MalformedPolicyDocument(Exception)?",
        f"the foundation's template was changed: restore it (git status), then {UP}",
    ),
    # ---- the network
    Refusal(
        "VPCIdNotSpecified|DefaultVpcDoesNotExist",
        f"this account has no default VPC in the region: {NO_DEFAULT_SUBNET}vpc",
    ),
    Refusal(
        "MissingInput",
        f"the default VPC has no subnet: {NO_DEFAULT_SUBNET}subnet --availability-zone ZONE",
    ),
    Refusal(
        r"InvalidSubnetID\.(NotFound|Malformed)|InvalidSubnet",
        "there is no such subnet in this region: aws ec2 describe-subnets lists them; "
        "correct target.subnet",
    ),
    Refusal(
        r"InvalidGroup\.NotFound|InvalidGroupId\.Malformed|InvalidSecurityGroupID\.NotFound",
        "there is no such security group in the subnet's VPC: aws ec2 describe-security-groups "
        "lists them; correct target.security_groups",
    ),
    Refusal(
        "InsufficientFreeAddressesInSubnet",
        "the subnet has no free address left: name another one, target.subnet=subnet-...",
    ),
    # ---- images, disks, keys, objects
    Refusal(
        "ParameterNotFound",
        "AWS publishes no such Deep Learning AMI in this region: name one of its own, "
        "target.image=ami-..., or another target.ssm_parameter, or choose another region",
    ),
    Refusal(
        r"InvalidAMIID\.(NotFound|Malformed|Unavailable)",
        "there is no such image in this region (ids differ by region), or not any more: correct "
        "target.image, or leave it out; a run whose image AWS has withdrawn goes on with a newer "
        "one where submit is given all its settings again",
    ),
    Refusal(
        "InvalidBlockDeviceMapping",
        "the disk is smaller than the image, or named otherwise there: raise target.disk_gb",
    ),
    Refusal(
        r"KMS\..*|InvalidKMSKey\..*|KMSAccessDeniedException|NotFoundException",
        "the key can't be used: it is disabled, another region's, or not there; "
        "correct target.kms_key, or enable it",
        says="(?i)kms|key",
    ),
    Refusal(
        "ValidationException|ClientError",
        "the image can't be pulled: it is not there, or in a registry that the training role may "
        f"not read; name its repository once: {UP} Image=URI",
        says="(?i)pull|ecr|registry|image",
    ),
    Refusal(
        "InvalidObjectState",
        "the object is archived (Glacier): restore it first (aws s3api restore-object)",
    ),
    Refusal(
        "NoSuchKey|NoSuchUpload",
        "it was there and is gone: something deletes objects in the bucket; start the same "
        "command again",
    ),
    Refusal(
        "AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraintException"
        "|TemporaryRedirect",
        "the bucket is in another region: give that region, in AWS_REGION or target.region",
    ),
    # ---- why EC2 ended a machine that it had just started (its StateReason)
    Refusal(
        r"Client\.InternalError|Client\.InvalidKMSKey\..*",
        "mostly the key of its disk: it is disabled, or its policy doesn't let EC2 and you use it "
        "(kms:CreateGrant, kms:Decrypt, kms:GenerateDataKeyWithoutPlaintext); correct "
        "target.kms_key, or the account's key for disks (EC2, Settings, EBS encryption)",
    ),
    Refusal(
        r"Client\.VolumeLimitExceeded|VolumeLimitExceeded|MaxIOPSLimitExceeded",
        "the account's quota of disks is full: delete some that nothing uses (python -m launch "
        "status lists this project's), lower target.disk_gb, or ask for more at "
        "https://console.aws.amazon.com/servicequotas (Amazon EBS)",
    ),
    Refusal(
        r"Client\.InvalidSnapshot\.NotFound",
        "the image's disk is gone: its owner has deleted it; correct target.image, or leave it out",
    ),
    # ---- now, not for ever
    Refusal(
        "Throttling(Exception)?|(EC2)?ThrottledException|RequestLimitExceeded|SlowDown"
        "|TooManyRequestsException|RequestThrottled(Exception)?|BandwidthLimitExceeded",
        "AWS asks for fewer calls: wait a minute and start the same command again",
        passes=True,
    ),
    Refusal(
        "ServiceUnavailable(Exception)?|ServiceException|InternalError|InternalFailure"
        "|InternalServerError|InternalServiceError|Unavailable|RequestTimeout(Exception)?"
        "|500|502|503|504",
        f"AWS, or the network to it, had a fault: {LATER}",
        passes=True,
    ),
)

# Actions that whoever administers the account needs, and a launcher doesn't.
_DEPLOYER = re.compile(
    r"cloudformation:.*|iam:(?!PassRole|CreateServiceLinkedRole).*|s3:(CreateBucket|DeleteBucket"
    r"|PutBucket.*|PutEncryption.*|PutLifecycle.*|DeleteObjectVersion|ListMultipartUploads"
    r"|ListBucketMultipartUploads|GetBucketTagging)|sagemaker:(Delete|List)(TrainingJob"
    r"|HyperParameterTuningJob|NotebookInstanceLifecycleConfig)s?|ec2:DeleteVolume"
)
_SERVING = re.compile(r"codebuild:.*|ecr:.*")
_AUDIT = re.compile(
    r"access-analyzer:.*|cloudtrail:.*|iam:(List|Get)(?!Role\b|Policy\b).*"
    r"|s3:GetBucket(Policy|Acl|Public).*|lambda:.*"
)


def refusal(code: str, message: str) -> Refusal | None:
    """Return the table's row for AWS's answer, None where it has none."""
    for each in REFUSALS:
        if re.fullmatch(each.code, code) and re.search(each.says, message):
            return each
    return None


def remedy(code: str, message: str, action: str = "") -> str | None:
    """Return what to do about a refusal, None where nothing is known.

    action: the refused action, as IAM or the call names it (service:Operation).
    """
    row = refusal(code, message)
    if row is not None:
        return row.remedy
    if re.fullmatch(DENIED, code):
        return permission(action)
    return None


def permission(action: str) -> str:
    """Return whom to ask for the right to an action, and the command that prints all rights."""
    if _SERVING.fullmatch(action):
        return (
            "ask who administers the account for it: `serving deploy` makes roles, so an "
            "administrator runs it"
        )
    part = "launcher"
    if _DEPLOYER.fullmatch(action):
        part = "deployer"
    elif _AUDIT.fullmatch(action):
        part = "audit"
    return (
        "ask who administers the account for it; "
        f"what this project needs: {command('launch', 'policy', '--for', part)}"
    )
