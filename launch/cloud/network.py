"""Where an EC2 machine would stand: its subnets, and whether they have a way to S3."""

from dataclasses import dataclass
from typing import Any

from launch.cloud.session import Aws

DEFAULT = "the default VPC"


@dataclass(frozen=True)
class Subnet:
    """A subnet, and how a machine in it comes to S3; way: None for none."""

    id: str
    zone: str
    vpc: str
    way: str | None


def subnets(aws: Aws, given: str | None) -> list[Subnet]:
    """Return the subnet that is given, else those of the default VPC. Raise AwsError."""
    wanted = {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]}
    if given is not None:
        wanted = {"Filters": [{"Name": "subnet-id", "Values": [given]}]}
    found = list(aws.pages("ec2", "DescribeSubnets", "Subnets", **wanted))
    if not found:
        return []
    vpcs = sorted({each["VpcId"] for each in found})
    of_vpcs = [{"Name": "vpc-id", "Values": vpcs}]
    tables = list(aws.pages("ec2", "DescribeRouteTables", "RouteTables", Filters=of_vpcs))
    return [
        Subnet(each["SubnetId"], each["AvailabilityZone"], each["VpcId"], _way(each, tables))
        for each in sorted(found, key=lambda each: str(each["AvailabilityZone"]))
    ]


def zones(aws: Aws, instance_type: str) -> list[str]:
    """Return the region's zones that offer a machine. Raise AwsError."""
    offered = aws.pages(
        "ec2",
        "DescribeInstanceTypeOfferings",
        "InstanceTypeOfferings",
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": [instance_type]}],
    )
    return sorted(each["Location"] for each in offered)


def lets_its_own_in(group: dict[str, Any]) -> bool:
    """Return whether members of a security group reach each other on every port of TCP."""
    for rule in group["IpPermissions"]:
        whole = rule["IpProtocol"] == "-1"
        if rule["IpProtocol"] == "tcp":
            whole = rule["FromPort"] <= 1024 and rule["ToPort"] == 65535
        sources = [pair["GroupId"] for pair in rule.get("UserIdGroupPairs", [])]
        if whole and group["GroupId"] in sources:
            return True
    return False


def _way(subnet: dict[str, Any], tables: list[dict[str, Any]]) -> str | None:
    """Return the way from a subnet to S3 by its route table, the VPC's main one without its own."""
    of_vpc = [each for each in tables if each["VpcId"] == subnet["VpcId"]]
    own = [each for each in of_vpc if subnet["SubnetId"] in _associated(each)]
    main = [each for each in of_vpc if any(one.get("Main") for one in each["Associations"])]
    for table in (own or main)[:1]:
        for route in table["Routes"]:
            gateway = route.get("GatewayId", "")
            if gateway.startswith("vpce-"):
                return "an endpoint of S3"
            if gateway.startswith("igw-"):
                return "the internet" if subnet.get("MapPublicIpOnLaunch") else None
            if route.get("NatGatewayId") or route.get("TransitGatewayId"):
                return "a NAT or transit gateway"
    return None


def _associated(table: dict[str, Any]) -> set[str]:
    return {each["SubnetId"] for each in table["Associations"] if "SubnetId" in each}
