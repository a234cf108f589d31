from tests.serving.fuzz import attack


def test_hostile_requests_do_no_harm(original, tmp_path):
    statuses = attack(original / "package", tmp_path, requests=400, seed=1)
    assert statuses.keys() >= {200, 400, 413, 415}  # the fuzzer reaches all these answers
