"""What every test shares: one thread, its own cache, no network, and an account of what was skipped."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.postgres_cluster import Cluster, postgres_missing

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

REAL_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ENABLE = {  # group -> how to have it run
    "browser": "apt-get install chromium, then: make test",
    "realdata": "put the real clips at ../shared/data (beside this repository), then: make test",
    "gpu": "run on a machine with a CUDA GPU: make test-all",
    "postgres": "apt-get install postgresql and pip install 'reelhf[postgres]', then: make test",
    "labelstudio": "start a Label Studio server (see tests/annotation/test_label_studio.py), then: make test",
    "other": "see the reasons above",
}
REQUIRED = {
    name.strip() for name in os.environ.get("REELHF_REQUIRE", "").split(",") if name.strip()
}


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - (ENABLE.keys() - {"other"})
    if unknown:
        known = ", ".join(name for name in ENABLE if name != "other")
        raise pytest.UsageError(
            f"REELHF_REQUIRE names {', '.join(sorted(unknown))}; known: {known}"
        )
    if not hasattr(config, "workerinput"):  # workers inherit the variable
        config.stash[CACHE] = tempfile.mkdtemp(prefix="reelhf-tests-")
        os.environ["REELHF_CACHE"] = config.stash[CACHE]


CACHE = pytest.StashKey[str]()


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("browser") and chromium_path() is None:
        pytest.skip("no Chromium on this machine")
    if item.get_closest_marker("realdata") and not REAL_DATA.is_dir():
        pytest.skip(f"no real clips at {REAL_DATA}")
    if item.get_closest_marker("postgres") and (missing := postgres_missing()):
        pytest.skip(missing)
    if item.get_closest_marker("labelstudio") and not os.environ.get("REELHF_LABEL_STUDIO"):
        pytest.skip("REELHF_LABEL_STUDIO names no server")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch can use")


@pytest.fixture(autouse=True, scope="module")
def _plain_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 replaces F.linear for as long as the process lives; later tests would round otherwise by what ran before."""
    yield
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    original = zero and getattr(zero.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original:
        sys.modules["torch"].nn.functional.linear = original


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """A skip in a group that REELHF_REQUIRE names is a failure."""
    report = yield
    required = [name for name in sorted(REQUIRED) if item.get_closest_marker(name)]
    if report.skipped and required and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = (
            f"REELHF_REQUIRE={','.join(required)}, but this test was skipped: {reason}"
        )
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Each group that was skipped, and the command that enables it."""
    groups: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        group = next((name for name in ENABLE if name in report.keywords), "other")
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        groups[group, reason.removeprefix("Skipped: ")] += 1
    slow_left_out = "not slow" in (terminalreporter.config.option.markexpr or "")
    if groups or slow_left_out:
        terminalreporter.section("not run here")
    for (group, reason), count in sorted(groups.items()):
        terminalreporter.write_line(f"{group}: {count} skipped, {reason} -> {ENABLE[group]}")
    if slow_left_out:
        terminalreporter.write_line("slow: left out -> make test-all")


def chromium_path() -> str | None:
    """The system's Chromium, if there is one."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium; skips without one. Use with `@pytest.mark.browser`."""
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium on this machine")
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real clips and ratings; skips without it. Use with `@pytest.mark.realdata`."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real clips at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server for this worker; skips without one. Use with `@pytest.mark.postgres`."""
    if missing := postgres_missing():
        pytest.skip(missing)
    cluster = Cluster()
    yield cluster
    cluster.stop()
