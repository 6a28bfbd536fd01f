"""What an import of a policy believed is said, what looks odd is a warning, and both are beside the weights."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.bridge.layouts import TINY_VLA, arrays, openvla_config, openvla_folder, openvla_shapes, state_shapes
from wovr_jax.bridge import importer
from wovr_jax.bridge.sources import FileError, open_source

CONFIG = openvla_config(num_attention_heads=4, vocab_size=392, pad_token_id=327)
CONFIG |= {"pad_token_id": 327, "image_sizes": [8, 8], "torch_dtype": "float32"}
HEADS = "attention heads of the towers"
ACTION = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
PROCESSOR = {
    "means": [[0.4850, 0.4560, 0.4060], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "image_resize_strategy": "resize-naive",
}


@pytest.fixture
def release(tmp_path):
    folder = openvla_folder(tmp_path / "release", arrays(openvla_shapes(**TINY_VLA)), CONFIG)
    put(folder, "dataset_statistics.json", {"libero_goal_no_noops": {"action": ACTION}})
    put(folder, "preprocessor_config.json", PROCESSOR)
    return folder


def put(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def opened(folder, **how):
    return importer.read_import(open_source(folder / "model.safetensors"), heads=2, **how)


def warnings(folder, **how):
    """All warnings but that on the heads of these tiny towers."""
    return [text for text in opened(folder, **how).warnings() if HEADS not in text]


def test_a_release_as_it_should_be_warns_of_nothing(release):
    ready = opened(release)
    assert warnings(release) == []
    said = "\n".join(ready.report())
    assert "recipe rlinf: no stop token behind the action slots, 1 picture(s), no robot state; no file tells" in said
    assert "statistics: dataset_statistics.json, because it is there; entries 'libero_goal_no_noops'" in said
    assert "preprocessor_config.json prepares pictures as here" in said


@pytest.mark.parametrize(
    "name, message",
    [
        ("action_head--150000_checkpoint.pt", "the actions of this policy come from that head"),
        ("proprio_projector--150000_checkpoint.pt", "was trained on the robot's state, which --state would give"),
        ("vision_backbone--150000_checkpoint.pt", "FiLM"),
        ("noisy_action_projector--9_checkpoint.pt", "by diffusion"),
        ("extra/critic.safetensors", "weights that no part here uses"),
    ],
)
def test_modules_that_are_copied_and_not_used(release, name, message):
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_bytes(b"PK\x03\x04")
    (said,) = warnings(release)
    assert said.startswith(f"{name} is copied and not used: ") and message in said


def test_a_projector_that_is_used_is_no_warning(release):
    torch = pytest.importorskip("torch")
    state = {name.removeprefix("proprio_projector."): shape for name, shape in state_shapes(8, 32).items()}
    wrapped = {f"module._orig_mod.{name}": torch.ones(shape) for name, shape in state.items()}
    torch.save(wrapped, release / "proprio_projector--5_checkpoint.pt")
    assert warnings(release, state=True) == [
        "statistics 'libero_goal_no_noops' in dataset_statistics.json: no quantiles of a robot state of 8 numbers"
    ]
    state = opened(release, state=True).state
    assert state and state["prefix"] == "module._orig_mod."


@pytest.mark.parametrize(
    "table, message",
    [
        ({}, "no action statistics, neither"),
        ({"a": {}}, "no quantiles q01 and q99 of actions"),
        (
            {"a": {"action": ACTION | {"q01": [0] * 14, "q99": [1] * 14}}},
            "actions of 14 numbers, and this policy has 7",
        ),
        ({"a": {"action": ACTION | {"q01": [0] * 7, "q99": [1, 0] + [1] * 5}}}, "q01 is not below q99 in dimension 1"),
        ({"1.0.0_no_noops": {"action": ACTION}}, "have the name of a folder, not of a data set"),
        ({"8f0d" * 10: {"action": ACTION}}, "have the name of a folder, not of a data set"),
    ],
)
def test_statistics_that_look_odd(release, table, message):
    put(release, "dataset_statistics.json", table)
    (said,) = warnings(release)
    assert message in said


def test_statistics_that_contradict_each_other(release):
    other = {"libero_goal_no_noops": {"action": ACTION | {"q01": [-2.0] * 7}}}
    put(release, "config.json", CONFIG | {"norm_stats": other})
    assert warnings(release) == [
        "statistics 'libero_goal_no_noops' differ between dataset_statistics.json and config.json"
    ]
    assert any("it goes before norm_stats of config.json" in line for line in opened(release).report())
    (release / "dataset_statistics.json").unlink()
    assert any("norm_stats of config.json, because there is no" in line for line in opened(release).report())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": 4}, "config.json says more than is looked at: num_experts 4"),
        ({"image_sizes": [384, 384]}, r"image_sizes \[384, 384\]; positions in the weights are for 8 pixels"),
        ({"torch_dtype": "bfloat16"}, "says bfloat16, the weights are float32: they are run in float32"),
        ({"vision_backbone_id": "clip-vit-l"}, "'clip-vit-l', and the towers here are dinosiglip's"),
    ],
)
def test_settings_that_differ_from_the_weights_or_are_not_read(release, change, message):
    put(release, "config.json", CONFIG | change)
    (said,) = warnings(release)
    assert re.search(message, said)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_config": CONFIG["text_config"] | {"hidden_size": 4096}}, "hidden_size 4096 instead of 32"),
        ({"text_config": CONFIG["text_config"] | {"num_hidden_layers": 32}}, "num_hidden_layers 32 instead of 3"),
        ({"timm_override_act_layers": ["quick_gelu", None]}, "timm_override_act_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_film": True}, "use_film True instead of False"),
    ],
)
def test_settings_of_another_network_are_refused(release, change, message):
    put(release, "config.json", CONFIG | change)
    with pytest.raises(FileError, match=message):
        opened(release)


def test_pictures_that_are_prepared_in_another_way(release):
    put(release, "preprocessor_config.json", PROCESSOR | {"means": [[0.5] * 3] * 2, "tvf_do_letterbox": True})
    (said,) = warnings(release)
    assert "means [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], here" in said and "tvf_do_letterbox True, here False" in said


def test_pointers_among_the_other_files_and_weights_beside_the_weights(release):
    (release / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid", encoding="utf-8")
    (release / "full_weights.pt").write_bytes(b"PK\x03\x04")
    first, second = warnings(release)
    assert first.startswith("tokenizer.model is a pointer of Git LFS")
    assert second.startswith("full_weights.pt hold the network too and are neither read nor copied")
    assert not any(file.name == "full_weights.pt" for file in opened(release).files)


def test_heads_that_contradict_a_released_tower(release):
    from wovr_jax.policy.weights import vla_config

    sizes: dict[str, Any] = TINY_VLA | {"dino": (1024, 3, 40)}
    with pytest.raises(ValueError, match="is a release's, with 16 heads, not 8; leave --heads away"):
        vla_config(openvla_shapes(**sizes), CONFIG, heads=8)


def test_the_summary_lies_beside_the_weights(release, tmp_path):
    (release / "action_head--1_checkpoint.pt").write_bytes(b"PK\x03\x04")
    ready = opened(release)
    about = json.loads(importer.write_import(ready, tmp_path / "ours").read_text(encoding="utf-8"))
    assert about["report"] == ready.report()[1:] and about["warnings"] == ready.warnings()
    assert any("action_head--1_checkpoint.pt" in text for text in about["warnings"])
