"""The table between RLinf's reward classifiers (``resnet_rm.pth``, ``taskemb_resnet_rm.pth``) and ours.

Source: DiffSynth-Studio-RLinf:diffsynth/models/reward_model.py. The plain network is one
sequence ``net``: stem, stages 1 to 4, pool, flatten, linear. The one with tasks calls the same
sequence ``visual_encoder`` and has ``task_embedding`` and ``fusion_layer`` beside it.

torch counts the batches that a normalisation has seen. We do not, but the counts are kept
beside the weights, so that a file comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wovr_jax.reward.classifier import RewardConfig
from wovr_jax.weights.table import Row, Table
from wovr_jax.weights.transforms import KERNEL, Shape

_NORM = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))


def reward_table(cfg: RewardConfig) -> Table:
    """Returns the rows of the classifier."""
    net = _sequence(cfg.head)
    layers = [
        (f"{net}.0.0", "stem"),
        *_blocks(cfg, "conv1"),
        *_blocks(cfg, "conv2"),
        *_blocks(cfg, "conv3", "shortcut"),
    ]
    norms = [(f"{net}.0.1", "stem_norm"), *_blocks(cfg, "bn1", "norm1"), *_blocks(cfg, "bn2", "norm2")]
    rows = [Row(f"{theirs}.{name}", f"{ours}/{leaf}") for theirs, ours in norms for name, leaf in _NORM]
    if cfg.head == "task":
        rows += [Row("task_embedding.weight", "task/embedding")]
        # 1 and 2 of the fusion are an activation and a dropout, which have no weights.
        layers += [("fusion_layer.0", "hidden"), ("fusion_layer.3", "out")]
    else:
        layers += [(f"{net}.{len(cfg.widths) + 3}", "out")]  # after stem, stages, pool and flatten
    # Linear layers and convolutions alike: (O, I, *window) there, (*window, I, O) here.
    rows += [Row(f"{theirs}.weight", f"{ours}/kernel", KERNEL) for theirs, ours in layers]
    rows += [Row(f"{theirs}.bias", f"{ours}/bias") for theirs, ours in layers]
    counts = {f"{theirs}.num_batches_tracked": 0 for theirs, _ in norms}
    return Table(f"RLinf's reward classifier, {cfg.head} head", tuple(rows), aside=counts)


def reward_config(shapes: Mapping[str, Shape]) -> RewardConfig:
    """Reads the sizes off a file; the stem's stride and pool leave no trace in it and are the reference's.

    Raises:
      KeyError: naming a tensor that no such file can be without.
    """
    head = "task" if "task_embedding.weight" in shapes else "plain"
    net = _sequence(head)
    # 0 is the stem; stages are the numbers of the sequence that have blocks with a first convolution.
    stages = sorted({int(name.split(".")[1]) for name in shapes if name.startswith(f"{net}.") and ".conv1." in name})
    # Every stage has as many blocks as the first.
    blocks = {int(name.split(".")[2]) for name in shapes if name.startswith(f"{net}.{stages[0]}.")} if stages else {0}
    cfg = RewardConfig(
        widths=tuple(shapes[f"{net}.{stage}.0.conv1.weight"][0] for stage in stages),
        blocks=len(blocks),
        stem_kernel=shapes[f"{net}.0.0.weight"][-1],
        head=head,
    )
    if head == "plain":
        return cfg
    tasks, embed = shapes["task_embedding.weight"]
    return RewardConfig.resnet18_task(
        widths=cfg.widths,
        blocks=cfg.blocks,
        stem_kernel=cfg.stem_kernel,
        tasks=tasks,
        embed=embed,
        hidden=shapes["fusion_layer.0.weight"][0],
    )


def _sequence(head: str) -> str:
    return "visual_encoder" if head == "task" else "net"


def _blocks(cfg: RewardConfig, theirs: str, ours: str | None = None) -> Iterator[tuple[str, str]]:
    """Yields their module and ours for one part of every residual block."""
    for stage in range(len(cfg.widths)):
        for block in range(cfg.blocks):
            yield (
                f"{_sequence(cfg.head)}.{stage + 1}.{block}.{theirs}",
                f"blocks/stage{stage}_block{block}/{ours or theirs}",
            )
