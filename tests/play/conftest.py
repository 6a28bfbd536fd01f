"""What the tests of play share: one small run, opened and compiled once."""

from __future__ import annotations

import pathlib

import pytest

from tests.play.small import make_run
from wovr_jax.play.programs import Programs
from wovr_jax.play.source import open_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="session")
def programs(run: pathlib.Path) -> Programs:
    return Programs(open_run(run))
