"""From episodes to a world model: what is watched on the way, what is kept, and that both kinds of weights load."""

import dataclasses

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sizes import draw_world, fake_world_train
from wovr_jax.core import checkpoint
from wovr_jax.core.config import ConfigError
from wovr_jax.core.log import read_metrics
from wovr_jax.data import episodes as disk
from wovr_jax.data.batches import Layout, gather_windows
from wovr_jax.data.stream import StreamConfig, window
from wovr_jax.run.folder import Product, Run
from wovr_jax.run.recipe import RefreshConfig
from wovr_jax.run.stages import world as stage
from wovr_jax.run.stages.episodes import no_demonstrations, read_in_turn
from wovr_jax.types import Episode, Imagined
from wovr_jax.world import latents
from wovr_jax.world.dit import DiTLoRA
from wovr_jax.world.model import WorldConfig
from wovr_jax.world.train import WorldTrainConfig

CFG = WorldConfig.fake()
TRAIN = fake_world_train(steps=4, validate_every=2)
PROMPT_KL = jnp.zeros((1, 5), jnp.int32)


def episodes(count=12, steps=16):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (count, steps + 1, 16, 16, 3), np.uint8)
    action = rng.uniform(-1, 1, (count, steps, 7)).astype(np.float32)
    none = np.zeros(steps + 1, bool)
    return [Episode(frame[e], action[e], none, "reach", 0, e, "base", action[e]) for e in range(count)]


@pytest.fixture(scope="module")
def params():
    return draw_world(CFG, jax.random.key(0))


def fit(run, train, params, source):
    """The world model of round 0, trained on ``source``."""
    vae, rollouts = Product(lambda: (CFG, params["vae"])), [Product(lambda: source)]
    made = (0, vae, [], rollouts, no_demonstrations())
    return stage.fit_world(
        run, train, RefreshConfig(), lambda: params["dit"], PROMPT_KL, lambda *_: jax.random.key(1), *made
    )


def test_training_is_watched_and_filmed_at_intervals_and_streams_from_a_folder(params, tmp_path):
    train = dataclasses.replace(TRAIN, latents="stream", stream=StreamConfig(visit=3, threads=2))
    disk.write(tmp_path / "episodes", episodes())
    run = Run(tmp_path / "run", {})
    product = fit(run, train, params, read_in_turn(tmp_path / "episodes", lazily=True))
    run.log.close()
    films = run.folder / "stages" / "world-0" / "films"
    assert [path.name for path in sorted(films.iterdir())] == ["step-000002.mp4", "step-000004.mp4"]
    with av.open(films / "step-000004.mp4") as film:
        assert len(list(film.decode(video=0))) == 17
    lines = read_metrics(run.folder)
    watched = {line["step"]: line for line in lines if "val_sample_mse" in line}
    assert sorted(watched) == [2, 4]
    assert watched[2]["val_sample_mse"] != watched[4]["val_sample_mse"]
    assert watched[4]["val_sample_mse"] == pytest.approx(product.facts["val_sample_mse"])
    assert all(line["input_wait_ms"] >= 0.0 for line in lines if "loss" in line)

    dit = product.value["dit"]
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), dit, params["dit"])))
    jax.tree.map(np.testing.assert_array_equal, product.value["vae"], params["vae"])


def test_of_an_adapter_training_only_adapters_are_kept(params, tmp_path, monkeypatch):
    train = dataclasses.replace(TRAIN, lora=DiTLoRA.wan(rank=2), validate_every=0, latents="disk")
    monkeypatch.setattr(stage.loop, "fit", lambda name, state, *args, **options: state)
    run = Run(tmp_path / "run", {})
    product = fit(run, train, params, episodes())
    run.log.close()
    assert len(list((run.folder / "latents").iterdir())) == 1
    assert checkpoint.exists(run.folder / "stages" / "world-0" / "adapters")
    assert not checkpoint.exists(run.folder / "stages" / "world-0" / "dit")
    jax.tree.map(np.testing.assert_array_equal, product.value["dit"], params["dit"])  # fresh adapters change nothing


@pytest.mark.parametrize("how", [{}, {"lora": DiTLoRA.wan(rank=2), "latents": "disk"}])
def test_a_model_is_trained_on_from_memories_of_its_own(params, tmp_path, monkeypatch, how):
    """The second training goes on from the first, on windows that remember what the first one imagines."""
    train = dataclasses.replace(TRAIN, validate_every=0, own_memory=(3,), **how)
    drawn, begun = [], []

    def remember(cfg, train, vae, episodes, cache="", *, held_out=0.15, seen=None, windows=stage.windows):
        drawn.append(seen)
        return windows(cfg, train, vae, episodes, cache, held_out=held_out, seen=seen)

    def begin(name, state, step, steps, fit=stage.loop.fit, **options):
        begun.append((name, steps, jax.tree.map(np.asarray, state.params)))
        return fit(name, state, step, steps, **options)

    monkeypatch.setattr(stage, "windows", remember)
    monkeypatch.setattr(stage.loop, "fit", begin)
    results = []
    for name in ("run", "again"):
        run = Run(tmp_path / name, {})
        product = fit(run, train, params, episodes())
        results.append(jax.tree.map(np.asarray, product.value["dit"]))
        run.log.close()
    jax.tree.map(np.testing.assert_array_equal, *results)

    assert [(name, steps) for name, steps, _ in begun[:2]] == [("world-0", 4), ("world-0-own-0", 3)]
    first, second = begun[0][2], begun[1][2]
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), first, second)))
    assert drawn[0] is None and [film.shape for film in drawn[1]] == [(17, 16, 16, 3)] * 12
    true = episodes()
    np.testing.assert_array_equal(drawn[1][3][0], true[3].frame_SHWC[0])
    assert (drawn[1][3][1:] != true[3].frame_SHWC[1:]).mean() > 0.5
    lines = {line["stage"] for line in read_metrics(run.folder)}
    assert {"world-0", "world-0-own-0"} <= lines


def test_a_memory_of_its_own_stands_before_the_true_frames(params):
    made = episodes(3)
    seen = [255 - episode.frame_SHWC for episode in made]
    train = dataclasses.replace(TRAIN, latents="fly")
    data, _ = stage.windows(CFG, train, params["vae"], made, seen=seen)
    rows = np.asarray(data.row_I2)
    frame_BFHWC, _ = gather_windows(data.windows, data.row_I2)
    shown = np.round((np.asarray(frame_BFHWC) + 1) * 127.5).astype(int)
    for (e, start), window_FHWC in zip(rows, shown, strict=True):
        steps = np.maximum(start + np.arange(CFG.slots + CFG.chunk), 0)
        np.testing.assert_array_equal(window_FHWC[0], made[e].frame_SHWC[0])
        np.testing.assert_array_equal(window_FHWC[1 : 1 + CFG.slots], seen[e][steps[: CFG.slots]])
        np.testing.assert_array_equal(window_FHWC[1 + CFG.slots :], made[e].frame_SHWC[steps[CFG.slots :]])
    # What is kept on disk is kept for these memories alone.
    plain, own = data.windows.replace(seen_ESHWC=None), data.windows
    plain, own = (jax.tree.map(np.asarray, windows) for windows in (plain, own))
    assert latents.digest(CFG, params["vae"], plain) != latents.digest(CFG, params["vae"], own)
    with pytest.raises(ConfigError, match="own_memory: expected none with latents='stream'"):
        dataclasses.replace(TRAIN, latents="stream", own_memory=(3,))


def test_a_film_has_a_row_for_each_episode_and_shows_the_truth_on_the_left(monkeypatch, tmp_path):
    shown, made = [], episodes(2, steps=24)

    def play(params, reward, start, action_BNTA, key):
        np.testing.assert_array_equal(action_BNTA.reshape(2, 24, 7), [episode.action_SA for episode in made])
        true_BSHWC = np.stack([episode.frame_SHWC[1:] for episode in made]) / 127.5 - 1.0
        none = {field.name: None for field in dataclasses.fields(Imagined)}
        video_BNTHWC = -true_BSHWC.reshape(2, 3, 8, 16, 16, 3)
        return Imagined(**none | {"frame_BNHWC": video_BNTHWC[:, :, 0], "video_BNTHWC": video_BNTHWC})

    monkeypatch.setattr(stage.programs, "replay", lambda cfg, judge: play)
    monkeypatch.setattr(stage.pixels, "video", lambda path, frames, fps: shown.append(frames))
    stage._film(CFG, {}, made, PROMPT_KL, tmp_path / "film.mp4", jax.random.key(0))
    (film,) = shown
    assert film.shape == (25, 32, 33, 3) and film.dtype == np.uint8
    np.testing.assert_array_equal(film[5, 16:, :16], made[1].frame_SHWC[5])
    np.testing.assert_array_equal(film[5, 16:, 17:], 255 - made[1].frame_SHWC[5].astype(int))
    np.testing.assert_array_equal(film[0, 16:, 17:], made[1].frame_SHWC[0])  # both begin at the same frame


def test_how_windows_are_encoded_is_a_setting(params):
    kinds = {"memory": latents.Latents, "fly": latents.Frames, "stream": latents.WindowStream}
    counts = set()
    for how, kind in kinds.items():
        data, held = stage.windows(CFG, dataclasses.replace(TRAIN, latents=how), params["vae"], episodes(3))
        assert isinstance(data, kind) and data.count and held.count
        counts.add(data.count)
    assert len(counts) == 1
    with pytest.raises(ValueError, match="needs a folder"):
        stage.windows(CFG, dataclasses.replace(TRAIN, latents="disk"), params["vae"], episodes(3))
    with pytest.raises(ValueError, match="latents: expected one of"):
        WorldTrainConfig(latents="dusk")


def test_what_is_drawn_on_the_host_is_what_is_drawn_on_the_device(params, monkeypatch):
    monkeypatch.setattr(latents, "_encode", lambda cfg, vae, *drawn: drawn)  # the frames and actions before the VAE
    data, _ = stage.windows(CFG, dataclasses.replace(TRAIN, latents="fly"), params["vae"], episodes(3))
    row_B, static_B = jnp.array([0, 3, 5]), jnp.array([False, True, False])
    layout = Layout(memory=CFG.slots, new=CFG.chunk, partial=True)
    cut = [window(episodes(3)[e], start, layout) for e, start in np.asarray(data.row_I2[row_B]).tolist()]
    frames, actions = (jnp.stack(parts) for parts in zip(*cut, strict=True))
    ours = latents.HostBatch(frames, actions, params["vae"], CFG).take_all(static_B)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), ours, data.take(row_B, static_B))


def test_the_cap_of_window_starts_is_a_setting_and_off(params):
    """The reference draws starts below frame 250 only, so the second half of a 512-frame episode is never seen."""
    last = {}
    for cap in (0, 3):
        data, _ = stage.windows(CFG, fake_world_train(latents="fly", start_cap=cap), params["vae"], episodes(4))
        last[cap] = int(np.asarray(data.row_I2)[:, 1].max())
    assert last == {0: 16 + 1 - 12, 3: 2}
    assert WorldTrainConfig().start_cap == 0
    assert WorldTrainConfig.rlinf().start_cap == 250
