"""For all tests: which ones run, real data, networks that are loaded once, small checkpoints, processes."""

import contextlib
import inspect
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import tiny_resnet
import torch
from PIL import Image

import detect_emotions
import model as shared

ROOT = Path(__file__).parent.parent
# Those of the shipped model and of the stand-ins; only tests of the default itself ask for `EMOTIONS`.
FIVE = ("angry", "disgusted", "happy", "sad", "surprised")
# FER2013, ImageNet and photos are too big or not free to ship; a checkout that has them has them here.
REAL_DATA = ROOT.parent / "shared" / "data"

# The networks here are so small that threads wait more than they work, most of all beside other processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# --- which tests run, and what is said of the others ---

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds, or a browser, a screen, signals; needs --all")
    cache = tempfile.TemporaryDirectory()  # what the tests compile is of no use to the user
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.stash[LEFT_OUT] = len(slow)
    config.hook.pytest_deselected(items=slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what did not run, and how it would."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"skipped: {count} tests: {reason}")
    if left_out := config.stash.get(LEFT_OUT, 0):
        kinds = "real networks on real data, processes, browsers, windows"
        all_run = "python -m pytest --all runs them"
        terminalreporter.write_line(f"left out: {left_out} slow tests ({kinds}); {all_run}")


# --- real data and real networks ---


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data in {REAL_DATA}; see README: Data, licences, credits")
    return REAL_DATA


NO_BROWSER = "no Chromium with chromedriver; apt-get install chromium chromium-driver"


@pytest.fixture
def browser(tmp_path):
    """A real browser, offline, that saves what it downloads in the folder of that name."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(NO_BROWSER)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1300,900"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_network_conditions(offline=True, latency=0, throughput=1)
    yield browser
    browser.quit()


def set_size(browser, width: int, height: int = 800) -> None:
    """Give a browser's page a size in pixels, narrower than its window can be."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture(scope="session")
def sample_photo() -> Path:
    return ROOT / "resources" / "sample.jpg"


# Loading a network takes a second or more. A script that runs in this process gets one that is loaded.
LOADED = {kind: kind.__init__ for kind in (shared.FaceFinder, shared.Classifier)}


def load_once(load: Callable) -> Callable:
    """Return an `__init__` that calls another one only where the options differ from all before."""
    loaded = {}

    def init(self: object, *args: object, **options: object) -> None:
        bound = inspect.signature(load).bind(self, *args, **options)
        bound.apply_defaults()
        key = tuple(map(str, bound.args[1:]))
        if key not in loaded:
            load(self, *args, **options)
            loaded[key] = dict(vars(self))
        vars(self).update(loaded[key])

    return init


@pytest.fixture(scope="session", autouse=True)
def load_networks_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kind, load in LOADED.items():
            patch.setattr(kind, "__init__", load_once(load))
        yield


@pytest.fixture
def load_networks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the loading itself."""
    for kind, load in LOADED.items():
        monkeypatch.setattr(kind, "__init__", load)


@pytest.fixture(scope="session")
def finder() -> shared.FaceFinder:
    """It looks for faces of 20 pixels or more, as facenet-pytorch's does."""
    return shared.FaceFinder(min_face_size=20)


@pytest.fixture(scope="session")
def classifier() -> shared.Classifier:
    """The shipped one."""
    return shared.Classifier(shared.DEFAULT_MODEL, "cpu")


# --- small stand-ins ---


def write_checkpoint(
    path: Path,
    net: torch.nn.Module,
    classes: Sequence[str],
    *,
    arch: str = tiny_resnet.ARCH,
    stage: str = "fer",
    image_size: int = 32,
    crop_margin: float = 0.0,
    temperature: float = 1.0,
) -> Path:
    """Write what a stage writes of a network."""
    run = shared.Run(path.parent, stage, arch, classes, classes, image_size, crop_margin, {}, path.name)
    run.save_best(net, [{"epoch": 1, "temperature": temperature, "temperature_all": temperature}])
    return path


@pytest.fixture
def gray_checkpoint(tmp_path: Path) -> Path:
    """Write a gray checkpoint as stage 1 does, of a tiny network with random weights."""
    torch.manual_seed(0)
    path = tmp_path / "gray" / "best.pt"
    return write_checkpoint(path, shared.gray_resnet(tiny_resnet.ARCH, 0), (), stage="gray", image_size=64)


def make_faces(folder: Path, per_class: int, classes: tuple[str, ...] = FIVE) -> Path:
    """Write learnable stand-ins for faces: 48 px gray, each class with its own bright bar on noise."""
    generator = torch.Generator().manual_seed(len(folder.parts) + per_class)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = torch.randint(0, 100, (48, 48), generator=generator, dtype=torch.uint8)
            pixels[label * 9 : label * 9 + 9] += 150
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:05}.png")
    return folder


@pytest.fixture
def fer_dir(tmp_path: Path) -> Path:
    """Write train, val and test as unpack_fer_data.py does, with stand-ins for faces."""
    for split, per_class in (("train", 16), ("val", 5), ("test", 6)):
        make_faces(tmp_path / "fer" / split, per_class)
    return tmp_path / "fer"


# --- running scripts ---


@pytest.fixture
def run(capsys):
    """Run detect_emotions.py and return its exit code, stdout and stderr."""

    def run(*args):
        code, message = 0, ""
        try:
            detect_emotions.main([str(arg) for arg in args])
        except SystemExit as stop:
            code, message = (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        captured = capsys.readouterr()
        return code, captured.out, captured.err + message

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a script as a process of its own, which ends with the test at the latest.

    It obeys Ctrl-C. Where a shell without job control started pytest in the background, pytest ignores it,
    and a child would inherit that.
    """
    processes = []

    def start(*args: object, **options: object) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # which no child inherits
        try:
            processes.append(subprocess.Popen([sys.executable, *map(str, args)], **{**pipes, **options}))
        finally:
            signal.signal(signal.SIGINT, handler)
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file that this process writes grow over a size: the write itself fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def address_space_limit(num_bytes: int) -> Iterator[None]:
    """Let this process take no more memory than it has and `num_bytes`."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(status["VmSize"].split()[0]) + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
