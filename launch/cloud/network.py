"""The network of an EC2 machine: its subnets, and whether they can reach S3."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.cloud.session import Aws

DEFAULT = "the default VPC"
NAT64 = "64:ff9b::/96"  # where a machine with IPv6 alone sends packets for IPv4 addresses


@dataclass(frozen=True)
class Subnet:
    """A subnet, and how a machine in it reaches S3. way: None where it can't.

    is_closed: whether it reaches nothing else, so no package index either.
    """

    id: str
    zone: str
    vpc: str
    way: str | None
    is_closed: bool
    is_ipv6_only: bool = False


def subnets(aws: Aws, given: Sequence[str], public_ip: bool | None = None) -> list[Subnet]:
    """Return the given subnets, else those of the default VPC.

    public_ip: whether machines get a public address there; None: as each subnet says. Raise
    AwsError.
    """
    wanted = {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]}
    if given:
        wanted = {"Filters": [{"Name": "subnet-id", "Values": list(given)}]}
    found = list(aws.pages("ec2", "DescribeSubnets", "Subnets", **wanted))
    if not found:
        return []
    if public_ip is not None:
        found = [each | {"MapPublicIpOnLaunch": public_ip} for each in found]
    vpcs = sorted({each["VpcId"] for each in found})
    of_vpcs = [{"Name": "vpc-id", "Values": vpcs}]
    tables = list(aws.pages("ec2", "DescribeRouteTables", "RouteTables", Filters=of_vpcs))
    known = []
    for each in sorted(found, key=lambda each: str(each["AvailabilityZone"])):
        routes = _routes(each, tables)
        leads_out = any(_leads_out(each, route) for route in routes)
        place = each["SubnetId"], each["AvailabilityZone"], each["VpcId"]
        ipv6_only = bool(each.get("Ipv6Native"))
        known.append(Subnet(*place, _way(each, routes), not leads_out, ipv6_only))
    return known


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


def _routes(subnet: dict[str, Any], tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a subnet's routes: those of its own route table, else of the VPC's main one."""
    of_vpc = [each for each in tables if each["VpcId"] == subnet["VpcId"]]
    own = [each for each in of_vpc if subnet["SubnetId"] in _associated(each)]
    main = [each for each in of_vpc if any(one.get("Main") for one in each["Associations"])]
    routes = [route for table in (own or main)[:1] for route in table["Routes"]]
    # The target of a route may be gone: AWS drops packets sent there.
    return [each for each in routes if each.get("State") != "blackhole"]


def _way(subnet: dict[str, Any], routes: list[dict[str, Any]]) -> str | None:
    """Return the way from a subnet to S3 by its routes, in words; None where there is none."""
    # The way to S3 itself is a route to its list of addresses; others lead through a firewall, say.
    to_lists = [each for each in routes if "DestinationPrefixListId" in each]
    if any(each.get("GatewayId", "").startswith("vpce-") for each in to_lists):
        return "an endpoint of S3"
    # A route to a company's own addresses alone, often through a transit gateway, doesn't reach S3.
    everywhere = [each for each in routes if _goes_anywhere(each)]
    if any(each.get("NatGatewayId") or each.get("TransitGatewayId") for each in everywhere):
        return "a NAT or transit gateway"
    out = any(_leads_out(subnet, each) for each in routes)
    return "the internet" if out else None


def _leads_out(subnet: dict[str, Any], route: dict[str, Any]) -> bool:
    """Return whether a route leads to all addresses, for a machine in the subnet."""
    if not _goes_anywhere(route):
        return False
    if route.get("GatewayId", "").startswith("igw-"):
        return bool(subnet.get("MapPublicIpOnLaunch"))
    return True


def _goes_anywhere(route: dict[str, Any]) -> bool:
    """Return whether a route leads to all IPv4 addresses, directly or from IPv6 by NAT64."""
    to_all = route.get("DestinationCidrBlock") == "0.0.0.0/0"
    return to_all or route.get("DestinationIpv6CidrBlock") == NAT64


def _associated(table: dict[str, Any]) -> set[str]:
    return {each["SubnetId"] for each in table["Associations"] if "SubnetId" in each}
