import pytest

from tests.mutations import MUTATIONS, PROJECT, verdicts


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_fault_has_its_place_and_its_test(mutation):
    assert (PROJECT / mutation.file).read_text().count(mutation.old) == 1
    path, *chosen = mutation.test.split(" ")
    tests = (PROJECT / "tests" / path).read_text()
    assert all(word in tests for word in chosen if word != "-k")


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_fault_is_noticed(mutation):
    [(_, wrong, said)] = verdicts([mutation])
    assert wrong is None, f"{wrong}: {said}"
