import contextlib
import functools
import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Flowers102, OxfordIIITPet

from tests.conftest import make_pictures
from trainer.common.console import log
from trainer.common.errors import Interrupted, UserError
from trainer.common.interrupt import Stop
from trainer.images import identity
from trainer.images.datasets import EMBEDDED, find_images, materialize
from trainer.images.decode import shrink
from trainer.images.folder import scan
from trainer.settings.config import run_name


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.*"))


def leftovers(root):
    return [path.name for path in root.parent.iterdir() if path != root]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "fashion_mnist"
    materialize("fashion_mnist", root)
    return root


# --- the embedded pictures ---


def test_fashion_mnist_becomes_class_folders_with_the_very_pixels(written):
    folder = scan({split: str(written / split) for split in ("train", "valid", "test")}, 0.15)
    arrays = np.load(EMBEDDED, allow_pickle=False)
    assert folder.classes == tuple(sorted(arrays["classes"].tolist()))
    for split, count in {"train": 2000, "valid": 500, "test": 500}.items():
        assert len(folder.splits[split].paths) == count
        numbers = [int(Path(path).stem) for path in folder.splits[split].paths]
        assert sorted(numbers) == list(range(count))
        for path, label, number in list(
            zip(folder.splits[split].paths, folder.splits[split].labels, numbers, strict=True)
        )[::50]:
            assert folder.classes[label] == arrays["classes"][arrays[f"{split}_y"][number]]
            assert np.array_equal(
                shrink(path, 28, "bilinear")[..., 0], arrays[f"{split}_x"][number]
            )
    assert leftovers(written) == []


def test_the_licence_travels_with_the_pictures():
    licence = (EMBEDDED.parent / "LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE" in licence and "The MIT License" in licence


def test_a_second_run_writes_nothing(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    materialize("fashion_mnist", written)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_a_folder_of_the_users_own_is_never_touched(tmp_path):
    materialize("folder", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_two_at_once_both_succeed(tmp_path):
    command = (
        "import sys; from pathlib import Path; from trainer.images.datasets import materialize; "
        "materialize('fashion_mnist', Path(sys.argv[1]))"
    )
    root = tmp_path / "data" / "fashion_mnist"
    both = [subprocess.Popen([sys.executable, "-c", command, root]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(listing(root)) == 3000
    assert leftovers(root) == []


def test_the_slower_of_two_accepts_what_the_faster_wrote(tmp_path, monkeypatch):
    root = tmp_path / "fashion_mnist"
    save = Image.Image.save

    def save_after_the_other(image, path):
        if not root.exists():
            root.mkdir()
            (root / "theirs.png").touch()
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", save_after_the_other)
    materialize("fashion_mnist", root)
    assert listing(root) == ["theirs.png"]
    assert leftovers(root) == []


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of_dead, of_living, elsewhere = (
        tmp_path / f".fashion_mnist.{host}.{process}.partial"
        for host, process in [
            (socket.gethostname(), dead.pid),
            (socket.gethostname(), os.getppid()),
            ("another-machine", dead.pid),
        ]
    )
    for partial in (of_dead, of_living, elsewhere):
        (partial / "train").mkdir(parents=True)
    materialize("fashion_mnist", tmp_path / "fashion_mnist")
    assert not of_dead.exists()
    assert of_living.exists() and elsewhere.exists()


def test_a_failed_attempt_leaves_nothing(tmp_path, monkeypatch):
    saved = []

    def full_disk(image, path):
        saved.append(path)
        if len(saved) == 100:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        materialize("fashion_mnist", tmp_path / "fashion_mnist")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file" / "data", tmp_path / "file" / "deeper" / "data"):
        with pytest.raises(UserError, match=r"not a folder, so data\.root="):
            materialize("fashion_mnist", root)


# --- downloads: torchvision's own, from a server of this machine ---


@contextlib.contextmanager
def served_by(handler):
    """The URL of an HTTP server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class HangUp(Quiet):
    """Promises more than it sends."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"short")


class Nonsense(Quiet):
    """Does not speak HTTP."""

    def do_HEAD(self):
        self.wfile.write(b"what?\r\n")

    def do_GET(self):
        self.do_HEAD()


@pytest.fixture
def server(tmp_path):
    """A folder, and the URL under which its files are served."""
    folder = tmp_path / "server"
    folder.mkdir()
    with served_by(functools.partial(Quiet, directory=folder)) as url:
        yield folder, url


@pytest.fixture
def hanging_up():
    with served_by(HangUp) as url:
        yield url


@pytest.fixture
def nonsense():
    with served_by(Nonsense) as url:
        yield url


@pytest.fixture
def nobody():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def pack(path, members):
    """A .tar.gz of {name: file}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, file in members.items():
            tar.add(file, name)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_pets_become_class_folders_with_the_very_files(tmp_path, server, picture, monkeypatch):
    folder, url = server
    lists = {
        "trainval": "Abyssinian_1 1 1 1\ngreat_pyrenees_2 2 2 1\n",
        "test": "Abyssinian_3 1 1 1\ngreat_pyrenees_4 2 2 1\n",
    }
    for name, lines in lists.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    pack(
        folder / "images.tar.gz",
        {
            f"images/{line.split()[0]}.jpg": picture
            for lines in lists.values()
            for line in lines.splitlines()
        },
    )
    pack(
        folder / "annotations.tar.gz",
        {f"annotations/{name}.txt": tmp_path / f"{name}.txt" for name in lists},
    )
    resources = tuple(
        (f"{url}/{name}", md5(folder / name)) for name in ("images.tar.gz", "annotations.tar.gz")
    )
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", resources)
    root = tmp_path / "data" / "pets"
    materialize("pets", root)
    expected = ["test/Abyssinian/Abyssinian_3.jpg", "test/Great Pyrenees/great_pyrenees_4.jpg"]
    assert listing(root) == [
        *expected,
        "train/Abyssinian/Abyssinian_1.jpg",
        "train/Great Pyrenees/great_pyrenees_2.jpg",
    ]
    assert (root / expected[0]).read_bytes() == picture.read_bytes()
    assert leftovers(root) == []


def test_flowers_become_class_folders(tmp_path, server, picture, monkeypatch):
    savemat = pytest.importorskip(
        "scipy.io", reason="torchvision reads the labels of the flowers with scipy"
    ).savemat
    folder, url = server
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    pack(
        folder / names["image"], {f"jpg/image_{number:05d}.jpg": picture for number in range(1, 7)}
    )
    savemat(folder / names["label"], {"labels": [[1, 102, 1, 102, 1, 102]]})
    savemat(folder / names["setid"], {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    monkeypatch.setattr(
        Flowers102, "_file_dict", {kind: (name, md5(folder / name)) for kind, name in names.items()}
    )
    monkeypatch.setattr(Flowers102, "_download_url_prefix", f"{url}/")
    root = tmp_path / "data" / "flowers102"
    materialize("flowers102", root)
    assert listing(root) == [
        *("test/c000/image_00005.jpg", "test/c101/image_00006.jpg"),
        *("train/c000/image_00001.jpg", "train/c101/image_00002.jpg"),
        *("valid/c000/image_00003.jpg", "valid/c101/image_00004.jpg"),
    ]
    assert leftovers(root) == []


@pytest.mark.parametrize(
    "source", ["nobody", "hanging_up", "nonsense", "server"]
)  # the server lacks the file
def test_a_failed_download_is_one_clear_line_that_says_what_to_do(
    tmp_path, monkeypatch, request, source
):
    url = f"{np.ravel(request.getfixturevalue(source))[-1]}/images.tar.gz"
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", ((url, "0" * 32),))
    with pytest.raises(UserError) as caught:
        materialize("pets", tmp_path / "data" / "pets")
    assert str(caught.value).startswith("data=pets: the download failed (")
    assert str(caught.value).endswith("give data=folder data.root=DIR")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_flowers_without_scipy_say_so_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(Flowers102, "download", lambda self: pytest.fail("downloaded"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs scipy.*\bflowers102\b"):
        materialize("flowers102", tmp_path / "flowers102")


# --- archives and tables in the place of folders ---


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with pictures of three classes."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "own", {"train": 4, "val": 2, "Test": 1})
    return tmp_path


def counts(images):
    return {name: len(split.paths) for name, split in images.splits.items()}


def test_an_archive_is_what_its_folder_is(own, configure):
    with tarfile.open("own.tar.gz", "w:gz") as tar:
        tar.add("own")
    folder, packed = (
        find_images(configure(f"data.root={root}", "platform.cache=cache"))
        for root in ("own", "own.tar.gz")
    )
    assert (
        identity.of_images(packed) == identity.of_images(folder)
        and packed.classes == folder.classes
    )
    assert counts(packed) == {"train": 12, "valid": 6, "test": 3}
    assert all(path.startswith("cache/archives/") for path in packed.splits["test"].paths)


def test_an_archive_may_stand_for_one_split(own, configure):
    with tarfile.open("test.tar", "w") as tar:
        tar.add("own/Test", "some/where")
    words = ("data.root=own", "data.test=test.tar", "platform.cache=cache")
    images = find_images(configure(*words))
    assert all(path.startswith("cache/") for path in images.splits["test"].paths)


def test_a_share_of_train_that_nobody_asks_for_is_told(own, configure, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    words = ("data.root=own", "data.valid_fraction=0.4", "platform.cache=cache")
    told = "data.valid_fraction=0.4 has no effect"
    find_images(configure(*words))
    assert told not in caplog.text  # nobody gave it
    find_images(configure(*words), words=words)
    assert told in caplog.text
    caplog.clear()
    shutil.rmtree("own/val")
    images = find_images(configure(*words), words=words)
    assert counts(images) == {"train": 6, "valid": 6, "test": 3} and told not in caplog.text


def test_unpacking_stops_when_asked(own, configure):
    with tarfile.open("own.tar", "w") as tar:
        tar.add("own")
    stop = Stop()
    stop.ask("SIGTERM")
    with pytest.raises(Interrupted):
        find_images(configure("data.root=own.tar", "platform.cache=cache"), stop)


@pytest.mark.parametrize(
    "words",
    [
        ("data.labels=own/train/labels.csv",),
        ("data.root=own", "data.labels=own/train/labels.csv"),
        ("data.root=own", "data.labels=train/labels.csv"),
        ("data.root=own.tar", "data.labels=train/labels.csv"),
    ],
)
def test_a_table_of_labels_lies_where_it_is_said_or_in_the_root(own, configure, words):
    classes = ("circle", "square", "stripe")
    rows = [f"{name}/00{number}.png,{name}" for name in classes for number in range(4)]
    if len(words) > 1:  # then the root is above
        rows = [f"train/{row}" for row in rows]
    Path("own/train/labels.csv").write_text("\n".join(["path,label", *rows]))
    with tarfile.open("own.tar", "w") as tar:
        tar.add("own")
    images = find_images(configure(*words, "platform.cache=cache"))
    assert images.classes == classes
    assert counts(images) == {"train": 9, "valid": 3}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("data.root=own", "data.labels=no.csv"), "data.labels=no.csv: there is no such file, nor"),
        (("data.labels=a.csv", "data.test=own/Test"), "data.labels=a.csv with data.test=own/Test:"),
        (("data.labels=own", "data.root=own"), "data.labels=own: there is no such file"),
    ],
)
def test_a_table_that_is_not_there_or_has_no_use_is_refused(own, configure, words, line):
    with pytest.raises(UserError) as caught:
        find_images(configure(*words))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_run_with_a_table_has_a_name_of_its_own(own, configure):
    names = {
        run_name(configure("data.root=own", *words))
        for words in ((), ("data.labels=a.csv",), ("data.labels=b.csv",))
    }
    assert len(names) == 3
