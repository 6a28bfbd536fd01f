"""The fake LIBERO as a fixture."""

from __future__ import annotations

import pytest

from tests.sim.libero.fake_libero import DEMONSTRATE, TASKS, FakePool
from wovr_jax.sim.libero import arena as libero


@pytest.fixture
def fake_libero(monkeypatch):
    """Puts the fake in the place of LIBERO."""
    FakePool.opened, FakePool.losing = 0, set()
    monkeypatch.setattr(libero, "Pool", FakePool)
    monkeypatch.setattr(libero, "DEMONSTRATE", DEMONSTRATE)
    monkeypatch.setattr(libero, "tasks", lambda suite: TASKS)
    monkeypatch.setattr(libero.setup, "fingerprint", lambda renderer: {"renderer": renderer})
    return FakePool
