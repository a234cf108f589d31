"""The table of what AWS ends names all that the project uses, and nothing else."""

from datetime import date

from launch.targets.instance_types import has_gpu
from tests import ends


def test_every_name_that_is_used_is_in_the_table_and_no_other():
    assert sorted(ends.used()) == sorted(ends.TABLE)


def test_every_line_says_where_and_when_it_was_read():
    for name, support in ends.TABLE.items():
        assert support.source.startswith("https://"), name
        assert support.ends is None or support.ends > support.read, f"{name} was over when read"


def test_botocore_knows_nothing_newer_than_the_table_has_seen():
    assert list(ends.newer()) == []


def test_a_newer_value_is_told(monkeypatch):
    monkeypatch.setattr(
        ends, "NOTEBOOK_PLATFORMS", ends.NOTEBOOK_PLATFORMS - {"notebook-al2023-v2"}
    )
    [line] = ends.newer()
    assert line.startswith("notebook platform: botocore knows notebook-al2023-v2;")


def test_what_ends_within_so_many_days_is_told():
    first = min(support.ends for support in ends.TABLE.values() if support.ends)
    assert ends.ending(date.fromordinal(first.toordinal() - 61)) == []
    told = ends.ending(date.fromordinal(first.toordinal() - 60))
    assert told and all(str(first) in line for line in told)
    assert len(ends.ending(date(2100, 1, 1))) == sum(
        support.ends is not None for support in ends.TABLE.values()
    )


def test_every_family_of_gpus_is_known_for_one():
    assert all(has_gpu(f"{family}.xlarge") for family in ends.GPU_FAMILIES)
    assert not has_gpu("m5.large")
