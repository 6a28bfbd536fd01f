"""Windows as latents: the same whether encoded beforehand, read from disk or encoded when drawn."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.data.batches import Layout, windows
from wovr_jax.types import NULL_ACTION, Episode
from wovr_jax.world import latents, model
from wovr_jax.world.model import WorldConfig

CFG = WorldConfig.fake(memory=1)


@pytest.fixture(scope="module")
def vae_params():
    return model.networks(CFG)[1].init(jax.random.key(0))


@pytest.fixture(scope="module")
def encoded(vae_params):
    return latents.encode_windows(CFG, vae_params, windows(episodes(), val_share=0.4), batch=4)


def episodes(count=3, steps=14, seed=0):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (count, steps + 1, 16, 16, 3), np.uint8)
    action = rng.uniform(-1, 1, (count, steps, 7)).astype(np.float32)
    none = np.zeros(steps + 1, bool)
    return [Episode(frame[e], action[e], none, "reach", 0, e, "base", action[e]) for e in range(count)]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [one.starts for one in a] == [one.starts for one in b]


def test_encoded_windows_are_the_encoded_frames(vae_params, encoded):
    runs = episodes()
    index = windows(runs, val_share=0.4)
    fit, held = encoded
    assert fit.count == len(index.train_I2) and held.count == len(index.val_I2)
    assert (fit.starts, held.starts) == (index.train_starts, index.val_starts)
    assert fit.latent_Ifhwc.shape[1:] == (4, 2, 2, 4)

    vae = model.networks(CFG)[1]
    encode = jax.jit(lambda frame: vae(vae_params, frame[None] / 127.5 - 1.0, method="encode")[0])
    row = int(np.flatnonzero(np.asarray(index.train_I2)[:, 1] == 2)[0])
    run = runs[int(index.train_I2[row, 0])]
    # Window from frame 2, one memory frame: anchor, frame 5 four times, frames 6..13 and what produced them.
    want = encode(run.frame_SHWC[[0, 5, 5, 5, 5, *range(6, 14)]].astype(np.float32))
    np.testing.assert_allclose(fit.latent_Ifhwc[row], want, atol=1e-4)
    null = np.float32(NULL_ACTION)
    np.testing.assert_array_equal(fit.action_IFA[row], np.stack([null] * 4 + list(run.action_SA[4:13])))

    begin = runs[int(index.train_I2[0, 0])]
    want = encode(begin.frame_SHWC[[0] * 5 + list(range(1, 9))].astype(np.float32))
    np.testing.assert_allclose(fit.latent_Ifhwc[0], want, atol=1e-4)
    np.testing.assert_array_equal(fit.action_IFA[0], np.stack([null] * 5 + list(begin.action_SA[:8])))
    still = encode(begin.frame_SHWC[[0] * 13].astype(np.float32))
    np.testing.assert_allclose(fit.static_Efhwc[int(fit.episode_I[0])], still, atol=1e-4)


def test_encoded_when_drawn_is_encoded_beforehand(vae_params, encoded):
    drawn = latents.frames(CFG, vae_params, windows(episodes(), val_share=0.4))
    take = jax.jit(lambda data, row_B, static_B: data.take(row_B, static_B))
    for before, fly in zip(encoded, drawn, strict=True):
        assert (before.count, before.starts) == (fly.count, fly.starts)
        row_B = jnp.arange(before.count)
        for static_B in (row_B < 0, row_B % 2 == 0):
            want, got = take(before, row_B, static_B), take(fly, row_B, static_B)
            np.testing.assert_allclose(got.latent_Bfhwc, want.latent_Bfhwc, atol=1e-4)
            np.testing.assert_array_equal(got.action_BFA, want.action_BFA)


def test_latents_on_disk_are_found_again(vae_params, encoded, tmp_path, monkeypatch):
    index = windows(episodes(), val_share=0.4)
    same(latents.encode_once(tmp_path, CFG, vae_params, index, batch=4), encoded)
    (kept,) = tmp_path.iterdir()

    def never(*args, **options):
        raise AssertionError("encoded although it is on disk")

    monkeypatch.setattr(latents, "encode_windows", never)
    same(latents.encode_once(tmp_path, CFG, vae_params, index, batch=4), encoded)
    assert list(tmp_path.iterdir()) == [kept], "nothing half written stays beside it"


@pytest.mark.parametrize("how", ["cut", "changed", "foreign"])
def test_a_damaged_file_is_said_to_be_so_and_made_again(vae_params, encoded, tmp_path, capsys, how):
    index = windows(episodes(), val_share=0.4)
    latents.encode_once(tmp_path, CFG, vae_params, index, batch=4)
    (kept,) = tmp_path.iterdir()
    if how == "foreign":
        shutil.rmtree(kept)
        kept.mkdir()
        (kept / "notes.txt").write_text("not latents")
    else:
        largest = max((path for path in kept.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        whole = largest.read_bytes()
        largest.write_bytes(whole[:-100] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    same(latents.encode_once(tmp_path, CFG, vae_params, index, batch=4), encoded)
    assert f"{kept} cannot be used" in capsys.readouterr().err
    same(latents.encode_once(tmp_path, CFG, vae_params, index, batch=4), encoded)
    assert not capsys.readouterr().err


def test_whatever_decides_the_latents_is_in_their_name(vae_params):
    index = windows(episodes(), val_share=0.4)
    other_vae = jax.tree.map(lambda leaf: leaf * 1.0001, vae_params)
    names = {
        latents.digest(cfg, params, cut)
        for cfg, params, cut in (
            (CFG, vae_params, index),
            (CFG, other_vae, index),
            (dataclasses.replace(CFG, memory=2), vae_params, index),
            (dataclasses.replace(CFG, anchor=False), vae_params, index),
            (CFG, vae_params, windows(episodes(seed=1), val_share=0.4)),
            (CFG, vae_params, windows(episodes(), Layout(partial=True), val_share=0.4)),
            (CFG, vae_params, windows(episodes(), Layout(start_cap=2), val_share=0.4)),
        )
    }
    assert len(names) == 7
    # What only training looks at is not: the variant without noisy context finds the same file.
    quiet = dataclasses.replace(CFG, noisy_context=False)
    assert latents.digest(quiet, vae_params, index) == latents.digest(CFG, vae_params, index)


def test_windows_cut_for_another_memory_are_refused():
    for how in (latents.encode_windows, latents.frames):
        with pytest.raises(ValueError, match=r"3 \+ 8 frames after the anchor"):
            how(CFG, {}, windows(episodes(), Layout(memory=3)))
