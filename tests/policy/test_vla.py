"""The policy's sequence: layout, padding, stop token, the shift by one, sizes, and acting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.core.pixels import make_mosaic
from wovr_jax.policy import actions
from wovr_jax.policy.actions import Codec
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.policy.vla import VLAConfig, flush_right, network, policy

CFG = VLAConfig.fake()
NET = network(CFG)
PARAMS = NET.init(jax.random.key(0))
WORDS = Tokenizer.tabletop()
PROMPT = jnp.asarray(WORDS.prompts(["pick up the red block", "put the green cube on the plate"]))
FRAME = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1.0)


def test_logits_are_float32_slots_over_256_ids():
    logits = NET(PARAMS, FRAME, PROMPT)
    assert logits.shape == (2, 8, 7, 256) and logits.dtype == jnp.float32
    half = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, dtype="bfloat16"))
    assert network(half)(PARAMS, FRAME, PROMPT).dtype == jnp.float32


def by_hand(params, frame, ids, recipe):
    """One unpadded row with every index written out; ids without pads."""
    module = NET.module(params)
    patch = module.projector(jnp.concatenate([module.dino(frame), module.siglip(frame)], axis=-1))
    text = module.llm.embed(ids[None])
    parts = [text[:, :1], patch, text[:, 1:], jnp.zeros((1, 56, CFG.llm.width))]
    if recipe == "oft":
        parts.append(module.llm.embed(jnp.array([[CFG.stop]])))
    x = jnp.concatenate(parts, axis=1)
    logits = module.llm.head(module.llm(x, jnp.ones(x.shape[:2], bool)))[0]
    last_prompt_token = 4 + len(ids) - 1  # four patches
    first_action = CFG.vocab_size - 256
    return logits[last_prompt_token : last_prompt_token + 56, first_action : CFG.vocab_size].reshape(8, 7, 256)


@pytest.mark.parametrize("recipe", ["rlinf", "oft"])
def test_sequence_equals_a_row_written_out_by_hand(recipe):
    ids = jnp.array(WORDS.encode("pick up the red block"))
    got = network(VLAConfig.fake(recipe))(PARAMS, FRAME, PROMPT)[0]
    np.testing.assert_allclose(got, by_hand(PARAMS, FRAME[:1], ids, recipe), atol=1e-5)


def test_stop_token_changes_the_logits():
    rlinf, oft = (network(VLAConfig.fake(recipe))(PARAMS, FRAME, PROMPT) for recipe in ("rlinf", "oft"))
    assert jnp.abs(rlinf - oft).max() > 1e-4


def test_neither_the_place_nor_the_number_of_pads_matters():
    want = NET(PARAMS, FRAME, PROMPT)
    rows = [[i for i in row if i != CFG.pad] for row in np.asarray(PROMPT).tolist()]
    right = jnp.array([row + [CFG.pad] * (32 - len(row)) for row in rows])
    np.testing.assert_allclose(NET(PARAMS, FRAME, right), want, atol=1e-5)


def test_flush_right_keeps_the_order():
    row = jnp.array([[1, 7, 9, 8, 9, 9]])
    np.testing.assert_array_equal(flush_right(row, 9), [[1, 9, 9, 9, 7, 8]])


def test_towers_are_not_interchangeable():
    swapped = jnp.roll(NET(PARAMS, FRAME, method="features"), CFG.dino.width, axis=-1)
    moved = NET(PARAMS, swapped, PROMPT, method="from_features")
    assert jnp.abs(moved - NET(PARAMS, FRAME, PROMPT)).max() > 1e-4


def test_slots_separate_from_the_second_layer_on():
    # RMSNorm(0) = 0: in the first layer every slot attends evenly and gets the same vector.
    def spread(depth):
        cfg = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, depth=depth))
        net = network(cfg)
        slot = net(net.init(jax.random.key(0)), FRAME, PROMPT).reshape(2, 56, 256)[
            :, 1:
        ]  # slot 0 is read at the prompt
        return float(jnp.abs(slot - slot.mean(1, keepdims=True)).max())

    assert spread(1) < 1e-5 < 1e-3 < spread(3)


def test_frame_prompt_and_other_sizes_matter():
    want = NET(PARAMS, FRAME, PROMPT)
    assert jnp.abs(NET(PARAMS, -FRAME, PROMPT) - want).max() > 1e-4
    assert jnp.abs(NET(PARAMS, FRAME, PROMPT[::-1]) - want).max() > 1e-4
    assert NET(PARAMS, jnp.zeros((2, 24, 24, 3)), PROMPT).shape == want.shape


def test_released_size():
    # The file has 7,541,237,184: the same, and what never reaches the policy. DINOv2's last block and
    # norm are 12,600,320 of it, SigLIP's last block, norm and attention pool 30,480,160.
    shapes = network(VLAConfig.openvla_7b()).shapes()
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert count["llm"] == 6_738_939_904 and count["projector"] == 71_385_600
    assert count["dino"] == 303_230_976 - 12_600_320
    assert count["siglip"] == 427_680_704 - 30_480_160
    assert sum(count.values()) == 7_541_237_184 - 43_080_480 == 7_498_156_704


def test_released_size_traces():
    cfg = VLAConfig.openvla_7b()
    out = jax.eval_shape(
        lambda p, f, t: network(cfg)(p, f, t),
        network(cfg).shapes(),
        jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 50), jnp.int32),
    )
    assert out.shape == (2, 8, 7, 256) and out.dtype == jnp.float32


def keys(batch):
    return jax.vmap(lambda b: jax.random.fold_in(jax.random.key(3), b))(jnp.arange(batch))


def test_acting():
    token, logp, action = policy(CFG, PARAMS, Codec(), 1.6)(FRAME, PROMPT, keys(2))
    assert token.shape == logp.shape == action.shape == (2, 8, 7)
    logits = NET(PARAMS, FRAME, PROMPT)
    np.testing.assert_allclose(logp, actions.log_prob(logits, token, 1.6), atol=1e-6)
    assert set(np.unique(action[..., 6])) <= {-1.0, 1.0}
    greedy = policy(CFG, PARAMS, Codec(), 0.0)(FRAME, PROMPT, keys(2))[0]
    np.testing.assert_array_equal(greedy, logits.argmax(-1))


def test_a_trajectory_does_not_depend_on_its_batch():
    act = policy(CFG, PARAMS, Codec())
    whole, alone = act(FRAME, PROMPT, keys(2)), act(FRAME[1:], PROMPT[1:], keys(2)[1:])
    np.testing.assert_array_equal(whole[0][1:], alone[0])


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="recipe"):
        VLAConfig.fake("causal")
    with pytest.raises(ValueError, match="equally many patches as dino"):
        dataclasses.replace(CFG, dino=dataclasses.replace(CFG.dino, image=32))
    with pytest.raises(ValueError, match="vocab_size"):
        dataclasses.replace(CFG, vocab_size=CFG.llm.rows + 1)


def test_bytes_and_prompts_without_a_batch_are_refused_while_tracing():
    cfg = VLAConfig.fake()
    net, frame_BHWC, prompt_BL = network(cfg), jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 26), jnp.int32)
    for frames, prompts, word in (
        (frame_BHWC.astype(jnp.uint8), prompt_BL, "frame_BHWC"),
        (frame_BHWC[..., :1], prompt_BL, "colours"),
        (frame_BHWC, prompt_BL[0], "prompt_BL"),
        (frame_BHWC, prompt_BL.astype(jnp.float32), "prompt_BL"),
    ):
        with pytest.raises(AssertionError, match=f"policy: .*{word}"):
            jax.eval_shape(net, net.shapes(), frames, prompts)


def test_a_mosaic_is_the_pictures_and_the_state_that_it_shows():
    cfg = dataclasses.replace(CFG, images=2, proprio=3)
    net, hand = network(cfg), FRAME[::-1]
    params, state = net.init(jax.random.key(0)), jax.random.uniform(jax.random.key(2), (2, 3), minval=-1.0)
    want = net(params, jnp.stack([FRAME, hand], axis=1), PROMPT, state)
    mosaic = make_mosaic([FRAME, hand], state, 4)
    np.testing.assert_allclose(net(params, mosaic, PROMPT), want, atol=1e-5)
    # One picture with the state, and two without it.
    one = network(dataclasses.replace(CFG, proprio=3))
    weights = one.init(jax.random.key(0))
    seen = make_mosaic([FRAME], state, 4)
    np.testing.assert_allclose(one(weights, seen, PROMPT), one(weights, FRAME, PROMPT, state), atol=1e-5)
    for lacking in (FRAME, mosaic[:, :, :32]):
        with pytest.raises(ValueError, match="or a mosaic of so many squares and the robot's 3 numbers"):
            net(params, lacking, PROMPT)
    two = network(dataclasses.replace(CFG, images=2))
    with pytest.raises(ValueError, match="or a mosaic of so many squares and the robot's 0 numbers"):
        two(two.init(jax.random.key(0)), mosaic, PROMPT)
