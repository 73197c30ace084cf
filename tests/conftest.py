"""Shared by all tests: one thread per process, before torch is imported; and one pool of ranks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool():
    with RankPool() as pool:
        yield pool
