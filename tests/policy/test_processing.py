"""Pictures as the two stacks prepare them, against Pillow, torch and arithmetic written out."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.policy import jpeg, processing
from wovr_jax.policy.processing import Processing

RLINF, OFT = Processing.rlinf(), Processing.oft()


def camera(height=256, width=256, seed=0):
    """A picture with edges, slopes, colour and a little noise, as cameras make them; (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / height
    slope = np.stack([x, y, 1 - x], -1) * 200 + 20
    slope[(x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.05] = (220, 40, 30)
    slope[int(0.7 * height) :, : width // 3] = (20, 90, 200)
    return np.clip(slope + rng.normal(0, 3, slope.shape), 0, 255).astype(np.uint8)


def levels(recipe, picture):
    """What comes out, back as levels 0 to 255."""
    out = np.asarray(jax.jit(lambda x: processing.frames(recipe, x))(jnp.asarray(picture)))
    assert out.dtype == np.float32
    return (out + 1.0) * 127.5


def close(got, want, share, most=1.0):
    """No pixel further than ``most`` levels, and at most ``share`` of them off at all."""
    gap = np.abs(np.asarray(got, np.float64) - want)
    assert gap.max() <= most + 1e-3, gap.max()
    assert (gap > 0.01).mean() <= share, (gap > 0.01).mean()


@pytest.fixture(scope="module")
def pillow():
    return pytest.importorskip("PIL.Image")


def resized_by_pillow(pillow, picture, kernel, size=224):
    """Per channel in floats: Pillow's kernels without its 8-bit rounding between the two axes."""
    kernel = {"cubic": pillow.Resampling.BICUBIC, "lanczos3": pillow.Resampling.LANCZOS}[kernel]
    channels = [pillow.fromarray(picture[..., i].astype(np.float32)) for i in range(3)]
    out = np.stack([np.asarray(channel.resize((size, size), kernel)) for channel in channels], -1)
    return np.clip(np.round(out), 0, 255)


def cropped_by_hand(picture, share=0.9):
    """TensorFlow's crop_and_resize and convert_image_dtype, written from their definitions."""
    height, width = picture.shape[:2]
    x, side = picture / 255.0, np.sqrt(share)
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            y0, x0 = ((1 - side) / 2 + side * k / (n - 1) for k, n in ((i, height), (j, width)))
            y0, x0 = y0 * (height - 1), x0 * (width - 1)
            top, left = int(y0), int(x0)
            dy, dx = y0 - top, x0 - left
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = x[top, left] * (1 - dx) + x[top, right] * dx
            out[i, j] = upper * (1 - dy) + (x[below, left] * (1 - dx) + x[below, right] * dx) * dy
    return np.floor(np.clip(out, 0, 1) * 255.5)


# Steps ------------------------------------------------------------------------------------------------------


def test_rlinf_is_torch_bicubic_rounded():
    torch = pytest.importorskip("torch")
    picture = camera()
    first = torch.tensor(picture).permute(2, 0, 1)[None].float()
    want = torch.nn.functional.interpolate(first, (224, 224), mode="bicubic", antialias=True, align_corners=False)
    want = want.clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    close(levels(RLINF, picture), want, share=1e-3)
    plain = torch.nn.functional.interpolate(first, (224, 224), mode="bicubic", antialias=False, align_corners=False)
    assert np.abs(levels(RLINF, picture) - plain[0].permute(1, 2, 0).numpy()).max() > 5  # without antialias


@pytest.mark.parametrize("kernel", processing.KERNELS)
@pytest.mark.parametrize("shape", [(256, 256), (180, 320)])
def test_resizes_are_pillows(pillow, kernel, shape):
    picture = camera(*shape)
    close(levels(Processing(kernel=kernel), picture), resized_by_pillow(pillow, picture, kernel), share=1e-3)
    other = {"cubic": "lanczos3", "lanczos3": "cubic"}[kernel]
    assert np.abs(levels(Processing(kernel=other), picture) - levels(Processing(kernel=kernel), picture)).max() > 2


def test_the_crop_is_tensorflows():
    picture = camera(48, 48)
    want = cropped_by_hand(picture)
    recipe = Processing(48, crop=0.9)
    close(levels(recipe, picture), want, share=1e-3)
    assert np.abs(want - picture).max() > 20
    # Wrong answers: the share taken for the side, and rounding to the nearest level.
    assert np.abs(levels(dataclasses.replace(recipe, crop=0.81), picture) - want).max() > 5
    flat = np.full((48, 48, 3), 100, np.uint8)
    np.testing.assert_allclose(levels(recipe, flat), 100, atol=1e-4)


@pytest.mark.parametrize("quality, shape", [(95, (256, 256)), (60, (99, 121))])
def test_the_jpeg_is_libjpegs(pillow, quality, shape):
    picture = camera(*shape)
    file = io.BytesIO()
    pillow.fromarray(picture).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    want = np.asarray(pillow.open(file)).astype(np.float32)
    back = jax.jit(lambda x: jpeg.round_trip(x, quality))(jnp.asarray(picture, jnp.float32)[None])
    got = np.asarray(back)[0]
    gap = np.abs(got - want)
    assert gap.mean() < 0.05 and gap.max() <= 8, (gap.mean(), gap.max())
    assert np.abs(want - picture).mean() > 1  # the file changed the picture by far more
    with_full_colour = io.BytesIO()
    pillow.fromarray(picture).save(with_full_colour, "JPEG", quality=quality, subsampling="4:4:4")
    assert np.abs(got - np.asarray(pillow.open(with_full_colour)).astype(np.float32)).mean() > 0.3


def test_jpeg_steps_are_libjpegs(pillow):
    file = io.BytesIO()
    pillow.fromarray(camera(16, 16)).save(file, "JPEG", quality=95)
    tables = pillow.open(file).quantization
    for number, table in ((0, jpeg.LUMA), (1, jpeg.CHROMA)):
        np.testing.assert_array_equal(sorted(tables[number]), np.sort(jpeg.steps(table, 95).ravel()))


# Recipes ------------------------------------------------------------------------------------------------------


def test_oft_is_its_three_steps_in_order(pillow):
    picture = camera()
    file = io.BytesIO()
    pillow.fromarray(picture).save(file, "JPEG", quality=95, subsampling="4:2:0")
    want = cropped_by_hand(resized_by_pillow(pillow, np.asarray(pillow.open(file)), "lanczos3"))
    gap = np.abs(levels(OFT, picture) - want)
    assert gap.max() <= 4 and gap.mean() < 0.05, (gap.max(), gap.mean())
    assert np.abs(levels(RLINF, picture) - want).mean() > 1  # the recipes are not interchangeable


def test_every_value_is_a_byte():
    for recipe in (RLINF, OFT):
        out = levels(recipe, camera())
        np.testing.assert_allclose(out, np.round(out), atol=1e-3)
        assert out.min() >= -1e-3 and out.max() <= 255.001


def test_a_frame_of_the_right_size_passes_rlinf_unchanged():
    picture = camera(224, 224)
    np.testing.assert_allclose(levels(RLINF, picture), picture, atol=1e-4)


def test_views_and_batches_are_processed_alike():
    views = np.stack([[camera(64, 64, seed=b + 2 * v) for v in range(2)] for b in range(3)])
    small = dataclasses.replace(OFT, size=32)
    out = levels(small, views)
    assert out.shape == (3, 2, 32, 32, 3)
    np.testing.assert_allclose(out[2, 1], levels(small, views[2, 1]), atol=1e-3)


def test_recipes_by_name():
    assert processing.of_recipe("oft", 32) == Processing(32, "lanczos3", 95, 0.9)
    assert processing.of_recipe("rlinf") == Processing(224, "cubic", 0, 1.0)
    with pytest.raises(ValueError, match=r"expected one of \('oft', 'rlinf'\), got 'openvla'"):
        processing.of_recipe("openvla")


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_frames_that_no_camera_sends(wrong):
    with pytest.raises(ValueError, match=r"camera frame: expected uint8 of shape \(\.\.\., height, width, 3\), got"):
        processing.frames(RLINF, wrong)


def test_recipes_that_mean_nothing():
    for wrong, message in (
        ({"kernel": "linear"}, "expected a kernel in"),
        ({"crop": 0.0}, r"crop in \(0, 1\]"),
        ({"jpeg": 101}, r"jpeg in \[0, 100\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Processing(**wrong)
