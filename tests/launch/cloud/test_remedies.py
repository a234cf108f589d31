"""Each refusal of AWS that a person meets names its own remedy, and the action that was refused."""

import re

import pytest
from botocore.exceptions import ClientError
from botocore.retries.standard import ThrottledRetryableChecker

from launch.cloud.remedies import REFUSALS, refusal
from launch.cloud.session import AwsError, explained, partition
from launch.targets.base import CONSOLES
from trainer.common.errors import UserError

MARKET = "In order to use this AWS Marketplace product you need to accept terms and subscribe"
ROLE = "Could not assume role arn:aws:iam::1:role/packhorse-training. Please ensure that it exists"
NO_QUOTA = "The account-level service limit 'ml.g4dn.xlarge for training job usage' is 0 Instances"
SCP = "User: x is not authorized to perform: ec2:RunInstances with an explicit deny in a "
ZONE = "Your requested instance type (g4dn.xlarge) is not supported in your requested Availability "
ENUM = "Value 'ml.g9.large' at 'resourceConfig.instanceType' failed to satisfy constraint"
KEY = "User: x is not authorized to perform: kms:GenerateDataKey on resource: y"

# AWS's code, its message, and the remedy in a few words.
EXAMPLES = [
    ("ExpiredToken", "", "the credentials have expired"),
    ("ExpiredTokenException", "", "aws sso login"),
    ("RequestExpired", "Request has expired.", "this machine's clock is wrong"),
    ("RequestTimeTooSkewed", "", "date -u"),
    ("SignatureDoesNotMatch", "Signature expired: 2026 is now earlier than", "set it right"),
    ("AuthFailure", "Signature not yet current", "set it right"),
    ("SignatureDoesNotMatch", "", "the secret key does not belong"),
    ("InvalidClientTokenId", "", "aws account enable-region"),
    ("AuthFailure", "AWS was not able to validate the provided credentials", "does not know these"),
    ("AccessDenied", "MultiFactorAuthentication failed with invalid MFA one time", "the next one"),
    ("ValidationError", "Stack [x] already exists and cannot be created again", "same stack now"),
    ("OperationNotPermitted", "Modify its 'disableApiTermination' attribute", "--no-disable-api"),
    ("RegionDisabledException", "", "is not enabled for this account"),
    ("OptInRequired", MARKET, "accept the image's terms"),
    ("OptInRequired", "You are not subscribed to this service", "is not yet activated"),
    ("PendingVerification", "", "at most 4 hours"),
    ("Blocked", "This account is currently blocked", "console.aws.amazon.com/support"),
    ("AccessDeniedException", SCP + "service control policy", "administers the organization"),
    ("AccessDenied", SCP + "permissions boundary", "permissions boundary of this user"),
    ("AccessDenied", KEY, "kms:GenerateDataKey and kms:Decrypt"),
    ("MaxSpotInstanceCountExceeded", "", "quota of spot machines"),
    ("Unsupported", ZONE + "Zone (us-east-1e)", "the zone doesn't have this machine"),
    (
        "Unsupported",
        "The requested configuration is currently not supported",
        "the region doesn't have",
    ),
    ("InsufficientInstanceCapacity", "", "no such machine free there now"),
    ("CapacityError", "", "no such machine free there now"),
    ("ResourceLimitExceeded", NO_QUOTA, "this quota is 0"),
    ("VcpuLimitExceeded", "more than your current vCPU limit of 0 allows", "this quota is 0"),
    ("VcpuLimitExceeded", "more than your current vCPU limit of 8 allows", "quota is too small"),
    ("AccountLimitExceededException", "Cannot have more than 0 builds in queue", "quota of builds"),
    ("LimitExceeded", "Cannot exceed quota for PoliciesPerRole: 10", "delete what is no longer"),
    ("ValidationException", ENUM, "does not know this instance type"),
    (
        "InvalidParameterValue",
        "Invalid value 'p9' for InstanceType.",
        "know this instance type",
    ),
    ("SpotMaxPriceTooLow", "", "spot machines cost more"),
    ("ValidationException", ROLE, "python -m launch up"),
    ("InvalidParameterValue", "(x) for parameter iamInstanceProfile.name is invalid", "launch up"),
    ("NoSuchBucket", "", "python -m launch up"),
    ("EntityAlreadyExists", "Role with name packhorse-training already exists", "project=NAME"),
    ("DeleteConflict", "Cannot delete a policy attached to entities.", "detach it"),
    ("AlreadyExistsException", "", "another command is changing the same"),
    ("InsufficientCapabilities", "", "template was changed"),
    ("VPCIdNotSpecified", "No default VPC for this user", "create-default-vpc"),
    ("MissingInput", "No subnets found for the default VPC 'vpc-1'.", "create-default-subnet"),
    ("InvalidSubnetID.NotFound", "", "correct target.subnet"),
    ("InvalidGroup.NotFound", "", "correct target.security_groups"),
    ("InsufficientFreeAddressesInSubnet", "", "no free address left"),
    ("ParameterNotFound", "", "target.image=ami-"),
    ("InvalidAMIID.NotFound", "", "ids differ by region"),
    ("InvalidAMIID.Unavailable", "", "goes on with a newer one"),
    ("Client.InternalError", "Client error on launch", "mostly the key of its disk"),
    ("Client.VolumeLimitExceeded", "Volume limit exceeded", "quota of disks is full"),
    ("VolumeLimitExceeded", "", "quota of disks is full"),
    ("Client.InvalidSnapshot.NotFound", "", "its owner has deleted it"),
    ("InvalidBlockDeviceMapping", "", "raise target.disk_gb"),
    ("KMS.DisabledException", "The key is disabled", "correct target.kms_key"),
    ("ValidationException", "Cannot pull the image from ECR", "the image can't be pulled"),
    ("InvalidObjectState", "", "restore it first"),
    ("NoSuchKey", "", "something deletes objects in the bucket"),
    ("PermanentRedirect", "", "the bucket is in another region"),
    ("ThrottlingException", "Rate exceeded", "wait a minute"),
    ("SlowDown", "", "wait a minute"),
    ("InternalFailure", "", "AWS, or the network to it, had a fault"),
    ("503", "", "AWS, or the network to it, had a fault"),
]


def told(code: str, message: str, action: str = "ec2:RunInstances") -> str:
    error = ClientError({"Error": {"Code": code, "Message": message}}, action.split(":")[1])
    return str(explained(error, action))


@pytest.mark.parametrize(("code", "message", "remedy"), EXAMPLES)
def test_a_refusal_is_one_line_with_its_own_remedy(code, message, remedy):
    line = told(code, message)
    assert remedy in line and code in line and "\n" not in line
    named = re.search(r"perform: (\S+)", message)
    assert line.startswith(f"{named[1] if named else 'ec2:RunInstances'}: ")


# What botocore takes for throttling, but for a limit, and for services that nobody here calls.
THROTTLED = set(ThrottledRetryableChecker()._THROTTLED_ERROR_CODES) - {
    "LimitExceededException",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "TransactionInProgressException",
}


@pytest.mark.parametrize(
    ("code", "message", "passes"),
    [
        ("ExpiredToken", "", True),
        ("RequestTimeTooSkewed", "", True),
        # A laptop that wakes up, before its clock is set.
        ("InvalidSignatureException", "Signature expired: 2026 is now earlier than", True),
        ("AuthFailure", "Signature not yet current", True),
        ("AuthFailure", "AWS was not able to validate the provided credentials", False),
        *((code, "", True) for code in sorted(THROTTLED)),
        ("RequestTimeout", "", True),
        ("LimitExceededException", "", False),
        ("AccessDenied", "", False),
        ("NoSuchBucket", "", False),
    ],
)
def test_what_passes_is_asked_again(code, message, passes):
    error = AwsError("", code, message, refused=True)
    assert error.passes is passes


def test_every_row_of_the_table_has_an_example():
    met = {refusal(code, message) for code, message, _ in EXAMPLES}
    assert [each.code for each in REFUSALS if each not in met] == []
    assert len({each.remedy for each in REFUSALS}) > 0.9 * len(REFUSALS), "each has its own"


ENCODED = "You are not authorized to perform this operation. Encoded authorization failure "


def test_a_denial_names_the_action_and_whom_to_ask():
    line = told("UnauthorizedOperation", f"{ENCODED}message: {'x' * 700}")
    assert line.startswith("ec2:RunInstances: UnauthorizedOperation (You are not authorized")
    assert "xxx" not in line and "policy --for launcher" in line
    for action, part in {
        "cloudformation:CreateChangeSet": "deployer",
        "iam:CreateRole": "deployer",
        "iam:PassRole": "launcher",
        "s3:PutBucketPolicy": "deployer",
        "s3:PutObject": "launcher",
        "sagemaker:CreateTrainingJob": "launcher",
        "access-analyzer:ValidatePolicy": "audit",
    }.items():
        message = f"User: x is not authorized to perform: {action} on resource: y"
        line = told("AccessDenied", message, "s3:Other")
        assert line.startswith(f"{action}: ") and f"policy --for {part}" in line


def test_what_only_serving_asks_for_is_an_administrators():
    for action in ("codebuild:StartBuild", "ecr:DescribeImages"):
        message = f"User: x is not authorized to perform: {action} on resource: y"
        line = told("AccessDeniedException", message, action)
        assert line.endswith("an administrator runs it") and "--for" not in line


def test_a_partition_is_botocores_and_an_unknown_region_one_line():
    regions = {
        "us-east-1": "aws", "cn-north-1": "aws-cn", "us-gov-west-1": "aws-us-gov",
        "eusc-de-east-1": "aws-eusc", "us-iso-east-1": "aws-iso", "us-isob-east-1": "aws-iso-b",
    }  # fmt: skip
    assert {region: partition(region) for region in regions} == regions
    assert set(CONSOLES) < set(regions.values())
    with pytest.raises(UserError, match="no such region"):
        partition("moon-1")
