import threading
import time

import numpy as np
import pytest
from PIL import Image

from serving.decoders import Decoders, Rooms
from serving.engine import Engine
from serving.handler import Settings, start_engine
from serving.package import load
from serving.work import Heavy, Work
from tests import hostile
from trainer.images.decode import ImageError


def soon() -> Work:
    return Work(300)


@pytest.fixture
def pictures(original) -> list[bytes]:
    return [
        (original / "package/golden" / name).read_bytes() for name in ("0.jpg", "1.png", "2.webp")
    ]


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (3, 1), (1, 4), (2, 2)])
def test_each_caller_gets_its_own_logits(original, pictures, expected, workers, batch):
    engine = Engine(
        load(original / "package", threads=1),
        Rooms(10**6),
        workers=workers,
        batch=batch,
        delay=0.01,
    )
    wrong: list[int] = []

    def ask(number: int) -> None:
        for turn in range(20):
            which = (number + turn) % 3
            logits = engine.scores([pictures[which]], soon()).logits[0]
            if np.abs(logits - expected[which]).max() > 1e-5:
                wrong.append(which)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pictures_that_come_together_run_together(original, pictures):
    engine = Engine(
        load(original / "package", threads=1), Rooms(10**6), workers=2, batch=4, delay=3600.0
    )
    sizes: list[int] = []
    engine.observe = sizes.append
    engine.scores([pictures[0]] * 8, soon())  # a full batch does not wait
    assert sizes == [4, 4]


def test_a_lone_picture_waits_no_longer_than_the_delay(original, pictures):
    engine = Engine(load(original / "package", threads=1), Rooms(10**6), batch=4, delay=0.1)
    began = time.monotonic()
    engine.scores([pictures[0]], soon())
    assert time.monotonic() - began >= 0.1


def test_who_gives_up_leaves_nothing_to_be_done(original, pictures):
    engine = Engine(load(original / "package", threads=1), Rooms(10**6), batch=2, delay=2.0)
    sizes: list[int] = []
    engine.observe = sizes.append
    with pytest.raises(TimeoutError):
        engine.scores([pictures[0]], Work(0.1))
    engine.scores([pictures[1]] * 2, soon())
    assert sum(sizes) == 2


def test_a_broken_picture_fails_alone(original, pictures, expected):
    engine = Engine(load(original / "package", threads=1), Rooms(10**6), batch=4, delay=0.05)
    failures: list[str] = []

    def fail() -> None:
        with pytest.raises(ImageError) as caught:
            engine.scores([b"GIF8"], soon())
        failures.append(str(caught.value))

    thread = threading.Thread(target=fail)
    thread.start()
    np.testing.assert_allclose(engine.scores(pictures, soon()).logits, expected, rtol=0, atol=1e-5)
    thread.join()
    assert len(failures) == 1


def test_pixels_are_limited(original, pictures):
    with pytest.raises(ImageError, match="too many"):
        Engine(load(original / "package", threads=1), Rooms(100)).scores([pictures[0]], soon())


def test_the_memory_of_large_pictures_has_a_bound_by_their_kind(original):
    """Of 2,000 x 2,000 pixels each, under a limit that one kind fits and another does not."""
    image = Image.linear_gradient("L").resize((2000, 2000))
    files = {
        kind: hostile.encoded(image.convert(mode), form, **more)
        for kind, mode, form, more in (
            ("plain", "RGB", "PNG", {}),
            ("transparent", "RGBA", "PNG", {}),
            ("webp", "RGB", "WebP", {}),
            ("jpeg", "RGB", "JPEG", {"progressive": True}),
        )
    }
    package = load(original / "package", threads=1)
    engine = start_engine(package, Settings(max_decoded=40_000_000, max_pixels=10**8))
    engine.scores([files["plain"], files["jpeg"], files["plain"]], soon())  # one after the other
    for kind in ("transparent", "webp"):
        with pytest.raises(ImageError, match="bytes of memory; allowed: 40,000,000"):
            engine.scores([files[kind]], soon())


def test_large_pictures_hold_up_no_small_one_however_many_they_are():
    decoders, finish = Decoders(threads=1), threading.Event()
    small = np.zeros((2, 2, 3), np.uint8)

    def large(may_be_large):
        if not may_be_large:
            raise Heavy
        assert finish.wait(600)
        return small

    waiting = [decoders.submit(0, large) for _ in range(10)]
    assert decoders.submit(0, lambda may_be_large: small).result(600) is small
    assert not any(future.done() for future in waiting)
    finish.set()
    assert all(future.result(600) is small for future in waiting)
