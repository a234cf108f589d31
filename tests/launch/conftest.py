"""What the tests of launch share."""

import pytest

from launch.cloud import s3


@pytest.fixture(autouse=True, scope="session")
def own_digests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is known of the tests' pictures doesn't go into the user's cache."""
    s3.DIGESTS = tmp_path_factory.mktemp("digests")
