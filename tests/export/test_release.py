"""An imported policy goes to the robot both ways: as a bundle that acts as it does, and as the folder for torch."""

from __future__ import annotations

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bridge import openvla_reference as torch_policy
from tests.bridge.layouts import openvla_folder, read, same
from tests.export.robots import KEY, TASKS, episode, imported
from tests.launch.test_export import door  # noqa: F401 (a fixture)
from wovr_jax.bridge import importer, torch_io
from wovr_jax.bridge.sources import find, open_source
from wovr_jax.core import checkpoint, config
from wovr_jax.data import episodes as disk
from wovr_jax.data import normalize
from wovr_jax.export import contract, source, torch_folder
from wovr_jax.export.robot import BundleError, Robot
from wovr_jax.policy import processing, vla
from wovr_jax.policy.tokenizer import ReleaseTokenizer
from wovr_jax.sim.libero import arena, setup
from wovr_jax.sim.libero.setup import LiberoError
from wovr_jax.sim.libero.tasks import Task
from wovr_jax.weights import native


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return imported(tmp_path_factory.mktemp("weights"))


def test_a_bundle_of_a_release_acts_as_the_release(door, ours, tmp_path):  # noqa: F811
    card, episodes = ours
    arguments = ("--policy", card, "--episodes", episodes, "--to", "jax", "--out", tmp_path / "robot", "--frames", 4)
    assert "libero_10_no_noops" in door(*arguments)[0]  # which statistics, of two
    status, out, _ = door(*arguments, "--key", "libero_goal", "--instruction", "Close the top drawer")
    assert status == 0 and "4 recorded frames, greedy: every action equal" in out
    robot = Robot.load(tmp_path / "robot")
    assert robot.frame_shape == (12, 20, 3) and robot.recipe["action"]["key"] == KEY
    assert (robot.recipe["image"]["jpeg"], robot.recipe["image"]["kernel"]) == (95, "lanczos3")

    frames = contract.choose_frames(episodes, 3, 8)
    texts = (*frames.instruction_K[:2], "close  the top DRAWER")
    cfg, params = native.load(card, put=lambda _, leaf: jax.device_put(leaf))
    folder = card.with_name("policy.rest") / "files"
    codec = source.Codec.from_statistics(normalize.load(folder, KEY)["action"])
    tokens = ReleaseTokenizer(folder, cfg.vocab_size, stop=cfg.stop, pad=cfg.pad, length=40).prompts(
        [" ".join(text.split()) for text in texts]
    )

    @jax.jit
    def act(params, frame, tokens, keys):
        seen = processing.frames(processing.of_recipe("oft", 8), frame)
        return vla.policy(cfg, params, codec, 0.0)(seen, tokens, keys)

    _, _, action = act(params, frames.frame_KHWC, tokens, jax.random.split(jax.random.key(0), 3))
    got = robot.act(frames.frame_KHWC, texts).action_BTA
    # Padded to another width, some sums of bfloat16 come out otherwise and a near tie may turn over.
    assert (np.abs(got - action) > 1e-6).mean() < 0.05
    assert np.ptp(got, axis=0).max() > 0.1  # frames and instructions matter
    with pytest.raises(BundleError, match=r"'juggle': this policy was exported for 3: .*open the top drawer"):
        robot.act(frames.frame_KHWC[:1], ["juggle"])


def begun_with(card, folder, **environment):
    """A run folder whose policy began with an imported release and learned on, in ``environment``."""
    cfg, params = native.load(card, put=lambda _, leaf: np.asarray(leaf, np.float32))
    settings = {"policy": config.to_dict(cfg), "temperature": 1.6} | environment
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    learned = jax.tree.map(lambda leaf: leaf * np.float32(1.01), params)
    checkpoint.save(folder / "stages" / "grpo-1" / "policy", learned)
    for stage, seeds in (("demonstrations", range(6)), ("collect-0", range(10, 14))):
        disk.write(folder / "stages" / stage / "episodes", (episode(i, 16, (12, 20)) for i in seeds))
    for stage in (folder / "stages").iterdir():
        (stage / "done.json").write_text('{"seconds": 1.0}')
    return folder


@pytest.mark.parametrize("where", ["libero", "recorded"])
def test_a_run_that_began_with_a_release_goes_to_the_robot(door, ours, tmp_path, where):  # noqa: F811
    """It reads instructions with the release's tokenizer, which a robot asks for more than the episodes show."""
    card, episodes = ours
    files = card.with_name("policy.rest") / "files"
    libero = {"suite": "libero_goal", "release": str(files)}
    robot = {"name": "mine", "instructions": [*TASKS, "close the top drawer"], "release": str(files)}
    run = begun_with(card, tmp_path / "run", **{where: libero if where == "libero" else robot})
    found = source.from_run(run)
    taught = source.from_import(card, episodes, key=KEY, instructions=["close the top drawer"])
    for text in (TASKS[0], *(["close the top drawer"] if where == "recorded" else [TASKS[1]])):
        ours_L, theirs_L = found.tokens(text), taught.tokens(text)
        assert [*ours_L[ours_L != found.cfg.pad]] == [*theirs_L[theirs_L != found.cfg.pad]]
    if where == "libero":  # scaled as the release's actions are
        assert found.key == KEY and found.statistics[KEY] == taught.statistics[KEY]
    else:  # a robot's own, as its policy was fine-tuned on them
        assert found.key == "mine" and list(found.statistics) == ["mine"]
    status, out, _ = door("--run", run, "--to", "jax", "--out", tmp_path / "robot", "--frames", 4)
    assert status == 0 and "4 recorded frames, greedy: every action equal" in out
    assert Robot.load(tmp_path / "robot").recipe["prompt"]["kind"] == "table"


def test_a_run_without_an_episode_of_its_own_goes_to_torch(ours, tmp_path, monkeypatch):
    """As where RLinf's start states are given: nothing is demonstrated or collected."""
    card, _ = ours
    release = str(card.with_name("policy.rest") / "files")
    libero = {"suite": "libero_goal", "release": release, "scene": {"size": 12}}
    run = begun_with(card, tmp_path / "run", libero=libero)
    for stage in ("demonstrations", "collect-0"):
        shutil.rmtree(run / "stages" / stage)
    with pytest.raises(LiberoError, match="not installed"):  # then nobody knows what it may be asked for
        monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
        source.from_run(run)
    told = [
        Task("libero_goal", i, text.replace(" ", "_"), text)
        for i, text in enumerate((TASKS[1], "close the top drawer"))
    ]
    monkeypatch.setattr(arena, "tasks", lambda suite: told)
    found = source.from_run(run)
    assert found.frame == (12, 12, 3) and list(found.prompt["rows"]) == [TASKS[1], "close the top drawer"]
    torch_folder.write(card, tmp_path / "robot", trained=found)
    folders = (card.parents[1] / "release", tmp_path / "robot")
    files = [[*folder.glob("model*.safetensors")] for folder in folders]
    theirs, written = ({name: leaf for file in some for name, leaf in read(file).items()} for some in files)
    assert theirs.keys() == written.keys()
    name = next(name for name in theirs if name.endswith("q_proj.weight"))
    np.testing.assert_allclose(written[name].astype(np.float32), 1.01 * theirs[name].astype(np.float32), rtol=1e-2)
    assert (written[name] != theirs[name]).mean() > 0.5


def test_a_run_whose_release_is_gone_says_so(ours, tmp_path):
    card, _ = ours
    libero = {"suite": "libero_goal", "release": "weights/goal/policy.rest/files"}
    run = begun_with(card, tmp_path / "run", libero=libero)
    with pytest.raises(
        source.SourceError, match=r"lies in weights/goal/policy\.rest/files, and that folder is not here"
    ):
        source.from_run(run)


CARD = """
{
  "config_class": "wovr_jax.policy.vla:VLAConfig",
  "config": {
    "dino": {
      "image": 8, "patch": 4, "width": 24, "depth": 3, "heads": 2, "mlp": 40, "prefix": 5, "layer_scale": true,
      "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "remat": true, "dtype": "bfloat16"
    },
    "siglip": {
      "image": 8, "patch": 4, "width": 12, "depth": 4, "heads": 2, "mlp": 20, "prefix": 0, "layer_scale": false,
      "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "remat": true, "dtype": "bfloat16"
    },
    "llm": {
      "rows": 392, "width": 32, "depth": 3, "heads": 4, "mlp": 48, "rope_theta": 10000.0, "eps": 1e-06,
      "remat": true, "dtype": "bfloat16"
    },
    "vocab_size": 328, "chunk": 8, "action_dim": 7, "recipe": "oft", "pad": 328, "stop": 2, "images": 1, "proprio": 0
  },
  "parameters": 77084,
  "sha256": "%s",
  "source": {
    "file": "model.safetensors.index.json", "format": "openvla", "prefix": "", "container": null, "aside": {},
    "rest": %s
  },
  "report": ["lora_adapter/ is copied and not merged; --adapter merge would do that"]
}
"""


def test_an_import_that_was_written_before_still_goes_to_the_robot(ours, tmp_path):
    """Its card as text, written out here, so that no renamed class, key or file goes unnoticed."""
    card, episodes = ours
    folder = shutil.copytree(card.parent, tmp_path / "ours")
    weights = (folder / "policy.safetensors").read_bytes()
    kept = [path for path in (folder / "policy.rest").rglob("*") if path.is_file()]
    sums = {path.relative_to(folder / "policy.rest").as_posix(): digest(path.read_bytes()) for path in kept}
    assert {"tensors.safetensors", "files/tokenizer.json", "files/dataset_statistics.json"} <= sums.keys()
    (folder / "policy.json").write_text(CARD % (digest(weights), json.dumps(sums)))
    policy, now = (source.from_import(path, episodes, key=KEY) for path in (folder / "policy.json", card))
    assert policy.cfg == now.cfg and policy.facts == now.facts and policy.recipe() == now.recipe()
    files = torch_folder.write(folder / "policy.json", tmp_path / "robot")
    assert tmp_path / "robot" / "tokenizer.json" in files


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_other_statistics_are_other_actions_and_are_caught(ours, tmp_path, monkeypatch):
    card, episodes = ours
    policy = source.from_import(card, episodes, key=KEY)
    other = source.from_import(card, episodes, key="libero_10")
    assert policy.tokens(TASKS[0]).tolist() == policy.recipe()["prompt"]["rows"][TASKS[0]]
    frames = contract.choose_frames(episodes, 4, 8)
    want, got = (contract._by_policy(whose, frames, 0.0, 4) for whose in (policy, other))
    np.testing.assert_array_equal(want.token_BTA, got.token_BTA)
    with pytest.raises(contract.ContractError, match=r"up to 0\.\d+\. They part first at frame 0 \(episode 0, step 0"):
        contract.compare("greedy", frames, want, got)


def test_a_policy_with_the_robots_state_goes_out_with_its_projector(tmp_path):
    pytest.importorskip("torch")
    from tests.bridge import test_pictures_and_state as two

    ready = two.opened(two.release(tmp_path / "release"), images=2, state=True)
    card = importer.write_import(ready, tmp_path / "ours")
    for overwrite in (False, True):
        files = torch_folder.write(card, tmp_path / "robot", overwrite=overwrite)
        assert tmp_path / "robot" / two.FILE in files
    then, now = (torch_io.load(tmp_path / there / two.FILE).tensors for there in ("release", "robot"))
    same(*({name: torch_io.to_numpy(tensor) for name, tensor in held.items()} for held in (then, now)))


def test_torch_acts_on_the_exported_folder_as_the_policy_does(door, tmp_path):  # noqa: F811
    """The reference is built from transformers' own modules, see ``tests/bridge/openvla_reference.py``."""
    library = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("torch")
    release_folder = openvla_folder(tmp_path / "release", torch_policy.weights(), torch_policy.CONFIG, 3)
    (file,) = find(release_folder)
    card = importer.write_import(importer.read_import(open_source(file), heads=torch_policy.HEADS), tmp_path / "ours")
    status, _, _ = door("--policy", card, "--to", "torch", "--out", tmp_path / "robot", "--shard-gb", 0.0001)
    assert status == 0
    files = sorted((tmp_path / "robot").glob("model-*.safetensors"))
    assert len(files) > 2
    theirs = torch_policy.Reference({name: array for file in files for name, array in library.load_file(file).items()})
    frame = np.random.default_rng(5).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    ids = [1, 17, 5, 80, 33, 9]
    best = np.stack([theirs.slots(frame[b : b + 1], ids, "rlinf").argmax(-1) for b in range(2)]).reshape(2, 8, 7)
    cfg, params = native.load(card, put=lambda _, leaf: jax.device_put(leaf))
    with jax.default_matmul_precision("highest"):
        act = vla.policy(cfg, params, source.Codec(), 0.0)
        token, _, _ = jax.jit(act)(frame, jnp.array([ids] * 2), jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(token, best)
