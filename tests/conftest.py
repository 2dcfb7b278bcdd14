"""Eight fake CPU devices for every test; surprises are errors."""

import logging
import os

# Threads for the fake devices to wait in for each other: with one a core, a step can block itself.
os.environ.setdefault("PJRT_NPROC", "32")
# What a test compiles it compiles itself, whatever an earlier run has left.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Of XLA's two generators of loop code for CPUs the one that compiles in a third of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compile faster
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(scope="session")
def devices():
    return jax.devices()


@pytest.fixture(autouse=True)
def _no_logging_left_behind():
    """`main` logs to the stderr of its test, which is closed when the next one logs."""
    before = logging.root.handlers[:]
    yield
    for handler in set(logging.root.handlers) - set(before):
        logging.root.removeHandler(handler)


# A file runs on one worker, where its programs are compiled once; the longest start first.
LONGEST = (
    *("test_survival", "test_pods", "test_decode_trained", "test_study", "test_encode_mode"),
    *("test_train", "test_objective", "test_step", "test_probe", "test_official"),
    *("test_weights_memory", "test_scale", "test_compiling", "test_diverged"),
)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
