"""Ranks that tests share."""

import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def started():
    """Ranks by their number, started when first asked for."""
    found = {}
    yield found
    for ranks in found.values():
        ranks.close()


@pytest.fixture
def two(started):
    return _get(started, 2)


@pytest.fixture
def four(started):
    return _get(started, 4)


@pytest.fixture(params=[2, 3, pytest.param(4, marks=pytest.mark.long)])
def ranks(request, started):
    return _get(started, request.param)


def _get(started, number):
    if number in started and started[number].lost:  # what it still says would be taken for another
        started.pop(number).close()
    if number not in started:
        started[number] = Ranks(number)
    return started[number]
