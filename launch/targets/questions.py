"""The read-only questions that a target asks AWS before anything is rented."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.cloud import network, quotas
from launch.cloud.quotas import Quota
from launch.cloud.session import Aws

REQUEST = "https://console.aws.amazon.com/servicequotas/home/services"


@dataclass(frozen=True)
class Answer:
    """A line to show; "": nothing. missing: what would stop the run, and what to do about it."""

    line: str
    missing: str | None = None


@dataclass(frozen=True)
class Question:
    """A question to AWS. about: its subject, in one word."""

    about: str
    ask: Callable[[Aws], Answer]


def quota(wanted: Quota) -> Question:
    """Return the question whether a quota is large enough."""

    def ask(aws: Aws) -> Answer:
        limit, number = quotas.value(aws, wanted)
        if limit is None:
            return Answer(
                f"{wanted.name}: AWS has no such quota in {aws.region}",
                f"{wanted.name}: there is no such machine in {aws.region}; "
                "choose another target.instance_type or target.region",
            )
        line = f"{wanted.name} ({number}): {limit:g} {wanted.unit}, needs {wanted.needed}"
        if limit >= wanted.needed:
            return Answer(line)
        page = f"{REQUEST}/{wanted.service}/quotas/{number}?region={aws.region}"
        return Answer(
            line,
            f"quota {wanted.name} ({number}): it is {limit:g} {wanted.unit} in {aws.region}, and "
            f"{wanted.needed} are needed; ask for more at {page} (it takes hours to days)",
        )

    return Question("quota", ask)


def capacity(instance_type: str, spot: bool, instances: int) -> Question:
    """Return the question where EC2 offers a machine, and how AWS rates the chances for spot.

    AWS doesn't tell whether a machine is free now; only a request can show it.
    """

    def ask(aws: Aws) -> Answer:
        zones = network.zones(aws, instance_type)
        if not zones:
            return Answer(
                f"{aws.region} offers no {instance_type}",
                f"{instance_type}: {aws.region} has no such machine; "
                "choose another target.instance_type or target.region",
            )
        line = f"{instance_type} is offered in {', '.join(zones)}"
        if not spot:
            return Answer(line)
        scores = aws.call(
            "ec2",
            "GetSpotPlacementScores",
            InstanceTypes=[instance_type],
            TargetCapacity=instances,
            RegionNames=[aws.region],
        )["SpotPlacementScores"]
        best = max((int(each["Score"]) for each in scores), default=None)
        return Answer(line if best is None else f"{line}; spot is rated {best} of 10 now")

    return Question("capacity", ask)


def together(subnet: str | None, groups: Sequence[str]) -> Question:
    """Return the question whether several machines of a run reach each other.

    groups: their security groups; [] means the VPC's default group, which AWS creates with a rule
    that lets its members talk to each other.
    """

    def ask(aws: Aws) -> Answer:
        filters = [{"Name": "group-id", "Values": list(groups)}]
        if not groups:
            vpcs = sorted({each.vpc for each in network.subnets(aws, [subnet] if subnet else [])})
            filters = [
                {"Name": "group-name", "Values": ["default"]},
                {"Name": "vpc-id", "Values": vpcs},
            ]
        found = list(aws.pages("ec2", "DescribeSecurityGroups", "SecurityGroups", Filters=filters))
        names = ", ".join(each["GroupId"] for each in found)
        if any(network.lets_its_own_in(each) for each in found):
            return Answer(f"the machines reach each other by {names}")
        if not found:
            return Answer("no security group is found")
        rule = ["aws", "ec2", "authorize-security-group-ingress", "--group-id"]
        rule += [found[0]["GroupId"], "--protocol", "tcp", "--port", "0-65535"]
        rule += ["--source-group", found[0]["GroupId"], "--region", aws.region]
        return Answer(
            f"{names} stops the machines from reaching each other",
            f"a rule by which the machines of {names} reach each other: {shlex.join(rule)}",
        )

    return Question("together", ask)


def way_to_s3(subnet: str | None, public_ip: bool | None = None) -> Question:
    """Return the question in which subnets machines would run, and whether they reach S3 there.

    public_ip: whether they have a public address; None: as the subnet says.
    """

    def ask(aws: Aws) -> Answer:
        found = network.subnets(aws, [subnet] if subnet else [], public_ip)
        if not found:
            missing = (
                f"a network: {aws.region} has no default VPC with subnets; name a subnet with a "
                "way to S3, target.subnet=subnet-..., or: aws ec2 create-default-vpc"
            )
            if subnet is not None:
                missing = f"target.subnet={subnet}: {aws.region} has no such subnet; correct it"
            return Answer("none", missing)
        cut_off = [each.id for each in found if each.way is None]
        ways = ", ".join(dict.fromkeys(each.way or "none" for each in found))
        named = f"subnet {subnet}" if subnet else f"{network.DEFAULT}, {len(found)} subnets"
        line = f"{named} ({found[0].vpc}); way to S3: {ways}"
        if len(cut_off) < len(found):
            return Answer(line)
        if all(each.is_ipv6_only for each in found):
            return Answer(
                line,
                f"a subnet with IPv4: {', '.join(cut_off[:3])} has IPv6 alone, which reaches "
                "neither S3 nor the package index: name another target.subnet, or give it NAT64 "
                f"(DNS64, and a route from {network.NAT64} to a NAT gateway)",
            )
        return Answer(
            line,
            f"a route to S3 from {', '.join(cut_off[:3])}: give the VPC a gateway endpoint of S3 "
            "(aws ec2 create-vpc-endpoint), which costs nothing, or name another target.subnet",
        )

    return Question("network", ask)
