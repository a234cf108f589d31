"""The registries of AWS's own container images, by region."""

from launch.cloud.session import domain
from trainer.common.errors import UserError

# The account whose registry holds AWS's images in a region (aws/deep-learning-containers,
# 2026-11); no API tells it.
_SHARED = (
    "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 eu-central-1 eu-west-1 eu-west-2 "
    "eu-west-3 eu-north-1 ap-south-1 ap-northeast-1 ap-northeast-2 ap-southeast-1 "
    "ap-southeast-2 sa-east-1"
)
REGISTRIES = dict.fromkeys(_SHARED.split(), "763104351884") | {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360",
    "ap-south-2": "772153158452",
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "eu-central-2": "380420809688",
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "mx-central-1": "637423239942",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "us-gov-west-1": "442386744353",
    "us-gov-east-1": "446045086412",
}


def registry_of(region: str, remedy: str) -> str:
    """Return the registry of AWS's images in a region. Raise UserError where it is not known.

    remedy: what the user can do then.
    """
    if region not in REGISTRIES:
        raise UserError(
            f"region {region}: Packhorse doesn't know the registry of AWS's images there; {remedy}"
        )
    return f"{REGISTRIES[region]}.dkr.ecr.{region}.{domain(region)}"
