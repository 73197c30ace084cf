"""One prover for all tests of the layouts: models and references are made once."""

import pytest

from tests.layouts.proof import Prover


@pytest.fixture(scope="session")
def prover(rank_pool, tmp_path_factory) -> Prover:
    return Prover(rank_pool, tmp_path_factory.mktemp("layouts"))
