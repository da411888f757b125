"""Four simulated devices, quick compilation, `--slow`, and where real models and texts lie."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's threads wait for one another by spinning: where workers share cores, an SVD with two of
# them takes ten times the CPU time of one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.compiling import Programs, compile_quickly  # noqa: E402

# Only possible before a backend starts.
jax.config.update("jax_num_cpu_devices", 4)

SHARED = Path(__file__).parents[2] / "shared"
PROGRAMS = Programs()
# What `pytest` leaves out, and how to run it; --slow runs all.
NOT_AT_ONCE = {
    "slow": "minutes on two cores; run with --slow",
    "thorough": "more cases of a law that quicker tests keep too; run with -m thorough",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow or thorough")
    parser.addoption("--optimize", action="store_true", help="compile as outside of the tests")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    # Tests of a file share what is compiled; spread over workers, each would compile it.
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"


def pytest_configure(config):
    if not config.getoption("--optimize"):
        compile_quickly()
    # JAX writes an entry in place and locks nothing: processes that share a folder may read half of
    # one. So each worker has its own, and an entry that a killed run left unfinished is no failure.
    if hasattr(config, "cache"):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(f"jax-{worker}")))
        # Compiled quickly, an update of a training that is run again would be below the default.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    config.addinivalue_line(
        "filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for name, reason in NOT_AT_ONCE.items():
        if name in config.getoption("markexpr"):
            continue
        skip = pytest.mark.skip(reason=f"{name}: {reason}")
        for item in items:
            if name in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    PROGRAMS.keep_few()


@pytest.fixture
def optimized():
    """Compiles a test's programs for speed: those that run for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("real models and texts are not here: no folder ../shared")
    return SHARED


@pytest.fixture(scope="module")
def kept_programs():
    """Programs compiled in a hurry, and kept for rows that would drop those before them."""
    quick = {
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: jax.config.values[name] for name in quick}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(int(value)))
        patch.setattr(jax, "clear_caches", lambda: None)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.clear_caches()
