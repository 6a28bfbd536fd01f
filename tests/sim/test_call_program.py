"""A program of ours is found beside the package in a clone, and among the shared files of a wheel's environment."""

from __future__ import annotations

from wovr_jax.sim import arena


def test_a_wheel_brings_the_program_along(tmp_path, monkeypatch):
    tools = tmp_path / "data" / "share" / "wovr_jax" / "launch" / "tools"
    tools.mkdir(parents=True)
    (tools / "echo.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(3)")
    # As installed: no folder launch/ beside the package.
    monkeypatch.setattr(arena, "__file__", str(tmp_path / "site-packages" / "wovr_jax" / "sim" / "arena.py"))
    monkeypatch.setattr(arena.sysconfig, "get_path", {"data": str(tmp_path / "data")}.__getitem__)
    assert arena.call_program("echo.py", "one", "two") == (3, "one two")


def test_a_clone_has_it_beside_the_package():
    status, said = arena.call_program("read_recordings.py", "--help")
    assert status == 0 and "usage" in said
