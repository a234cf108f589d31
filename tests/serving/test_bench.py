import re
from io import BytesIO

import pytest
from PIL import Image

from serving.__main__ import main
from serving.bench import Load, advise, example


def test_quantiles_are_nearest_ranks():
    load = Load(1, 10.0, [float(number) for number in range(1, 101)], 0)
    assert (
        load.quantile(0.5),
        load.quantile(0.95),
        load.quantile(0.99),
        load.quantile(1.0),
        load.rate,
    ) == (50, 95, 99, 100, 10)


def test_advice_follows_from_the_best_load_within_the_limit():
    slow = Load(8, 10.0, [2.0] * 1000, 0)  # faster, and too late
    good = Load(2, 10.0, [0.4] * 100, 0)  # 10 a second
    failing = Load(4, 10.0, [0.1] * 500, 3)
    advice = advise([slow, good, failing], per_minute=1000, limit=1.0, price=0.1)
    assert advice is not None
    assert advice.target == 420  # 70 % of 10 a second
    assert advice.instances == 3  # 1000 / 420
    assert advice.concurrency == 7  # Little: 1000 / 60 a second, 0.4 s each
    assert advice.month == pytest.approx(3 * 0.1 * 730)
    assert advise([slow], 10, 1.0, 0.1) is None


def test_the_example_is_a_photos_size():
    with Image.open(BytesIO(example())) as image:
        assert (image.format, image.size) == ("JPEG", (500, 375))


def test_a_server_is_measured(server, capsys):
    assert (
        main(
            [
                "bench",
                f"http://127.0.0.1:{server.port}",
                "--seconds",
                "0.5",
                "--clients",
                "1,3",
                "--rate",
                "100",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert re.search(r"^ +1 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +0$", output, re.M) and re.search(
        r"^ +3 ", output, re.M
    )
    assert "For 100 requests a minute" in output and "ml.m5.large" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], "no request was answered"),
        (["127.0.0.1:8080"], "not a server's URL"),
        (["http://a", "--clients", "0"], "at least 1"),
        (["http://a", "--picture", "nowhere.jpg"], "nowhere.jpg: it is missing"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    assert main(["bench", *arguments, "--seconds", "0.1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
