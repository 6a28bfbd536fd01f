"""A policy in PyTorch learns in a world model that a server turns: imitation, then GRPO in imagination, then the truth.

    python -m data_prep.to_lerobot runs/pace/stages/demonstrations/episodes --out build/table --robot table
    python launch/play.py runs/pace --rows 64                       (in another terminal; it is the only one with jax)
    python notebooks/torch_world_rl.py build/table

The first line writes the run's demonstrations as a LeRobot data set, the second serves the run's world model and its
true simulator, the third does the rest, with torch, numpy and pyarrow and without jax. It prints what the judge pays
in imagination as it goes, and true success before and after on layouts that no training saw, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import pathlib
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from wovr_jax.export.world_env import WorldEnv

BINS = 17
"""Values of each of the 8 x 7 numbers of a chunk, from -1 to 1, as RT-1 and OpenVLA have it: a digital hand's speeds
and an open or closed gripper are among them, and what a policy never does gets no probability."""
SHIFT = 3
"""Pixels by which pictures are moved in imitation: the same action leads from hand to block wherever the two are."""


class Policy(nn.Module):
    """Frame (N, H, W, 3) uint8 and task (N,) in, logits (N, 8, 7, BINS) of a chunk out.

    Args:
      frame: (H, W, 3).
      chunk: (T, A), 8 actions of 7 numbers.
      tasks: how many instructions there are.
    """

    def __init__(self, frame: tuple[int, ...], chunk: tuple[int, ...], tasks: int):
        super().__init__()
        self.chunk = chunk
        self.see = nn.Sequential(
            *(nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 4, 2, 1), nn.ReLU(), nn.Flatten()),
        )
        self.task = nn.Embedding(tasks, 16)
        side = frame[0] // 8 * (frame[1] // 8) * 64
        self.act = nn.Sequential(
            nn.Linear(side + 16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, np.prod(chunk) * BINS)
        )

    def forward(self, frame: torch.Tensor, task: torch.Tensor) -> Categorical:
        seen = self.see(frame.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        return Categorical(logits=self.act(torch.cat([seen, self.task(task)], 1)).view(-1, *self.chunk, BINS))


def to_action(token: torch.Tensor) -> np.ndarray:
    """Returns the middles of bins."""
    return (token.numpy() * (2.0 / (BINS - 1)) - 1.0).astype(np.float32)


def to_token(action: np.ndarray) -> torch.Tensor:
    """Returns the bins of actions."""
    return torch.from_numpy(np.rint((np.clip(action, -1, 1) + 1.0) * ((BINS - 1) / 2)).astype(np.int64))


# Imitation -------------------------------------------------------------------------------------------------------


def read_demonstrations(folder: pathlib.Path, env: WorldEnv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns frames (K, H, W, 3), tasks (K,) as ``env`` counts them, and the chunk (K, T, A) that follows, as bins."""
    paths = sorted(folder.glob("data/*/*.parquet"))
    if not paths:
        raise SystemExit(f"{folder}: expected a LeRobot data set, found no data/*/*.parquet in it; see the first line")
    named = pq.read_table(folder / "meta" / "tasks.parquet").to_pydict()
    number = {k: env.instructions.index(words) for k, words in zip(named["task_index"], named["task"])}
    frames, tasks, chunks = [], [], []
    for path in paths:
        table = pq.read_table(path).to_pydict()
        episode = np.array(table["episode_index"])
        action = np.array(table["action"], np.float32)
        for i, picture in enumerate(table["observation.images.image"]):
            frames.append(np.asarray(Image.open(io.BytesIO(picture["bytes"]))))
            tasks.append(number[table["task_index"][i]])
            # An episode that is over stays as it is: its last action again and again.
            last = np.flatnonzero(episode == episode[i])[-1]
            chunks.append(action[np.minimum(np.arange(i, i + env.action_shape[0]), last)])
    return torch.from_numpy(np.stack(frames)), torch.tensor(tasks), to_token(np.stack(chunks))


def imitate(policy: Policy, demonstrations: tuple[torch.Tensor, ...], updates: int, batch: int = 64) -> None:
    """Teaches the policy the demonstrations' chunks."""
    frame, task, token = demonstrations
    padded = functional.pad(frame.permute(0, 3, 1, 2).float(), [SHIFT] * 4, mode="replicate").permute(0, 2, 3, 1)
    height, width = frame.shape[1:3]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=updates)
    for i in range(updates):
        k = torch.randint(len(frame), (batch,))
        y, x = torch.randint(2 * SHIFT + 1, (2,)).tolist()
        loss = -policy(padded[k, y : y + height, x : x + width], task[k]).log_prob(token[k]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (i + 1) % max(1, updates // 4) == 0:
            print(f"imitation {i + 1}/{updates}: loss {loss.item():.3f}", flush=True)


# Reinforcement in imagination ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollouts:
    """N rollouts of C chunks: what the policy saw, what it drew, whether the row was still going, and the reward."""

    frame: torch.Tensor  # (C, N, H, W, 3)
    task: torch.Tensor  # (N,)
    token: torch.Tensor  # (C, N, T, A)
    logp: torch.Tensor  # (C, N, T, A)
    live: torch.Tensor  # (C, N) bool
    reward: torch.Tensor  # (N,)


@torch.no_grad()
def roll(policy: Policy, env: WorldEnv, rows: np.ndarray, *, greedy: bool = False) -> Rollouts:
    """Plays one episode from each of the start states ``rows`` (N,)."""
    frame, info = env.reset(options={"rows": rows})
    task = torch.from_numpy(info["task"].astype(np.int64))
    live, reward, steps = np.ones(env.num_envs, bool), np.zeros(env.num_envs, np.float32), []
    while live.any():
        seen = torch.from_numpy(frame)
        chosen = policy(seen, task)
        token = chosen.logits.argmax(-1) if greedy else chosen.sample()
        steps.append((seen, token, chosen.log_prob(token), torch.from_numpy(live.copy())))
        frame, paid, terminated, truncated, _ = env.step(to_action(token))
        reward += paid * live
        live &= ~(terminated | truncated)  # a row that has ended begins anew, and that is not looked at
    seen, token, logp, going = (torch.stack(x) for x in zip(*steps))
    return Rollouts(seen, task, token, logp, going, torch.from_numpy(reward))


def join(parts: list[Rollouts]) -> Rollouts:
    """Batches side by side; the shorter ones are filled with chunks that do not count."""
    chunks = max(len(part.live) for part in parts)

    def fill(x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x, [0] * (2 * x.dim() - 1) + [chunks - len(x)])

    joined = {
        name: torch.cat([fill(getattr(p, name)) for p in parts], 1) for name in ("frame", "token", "logp", "live")
    }
    return Rollouts(task=torch.cat([p.task for p in parts]), reward=torch.cat([p.reward for p in parts]), **joined)


def update(policy: Policy, optimizer: torch.optim.Optimizer, rolled: Rollouts, group: int, epochs: int = 2) -> float:
    """Takes GRPO's steps on rollouts whose neighbours, ``group`` of them, began alike; returns the share clipped."""
    reward = rolled.reward.view(-1, group)
    advantage = (reward - reward.mean(1, keepdim=True)).flatten()
    advantage = advantage / (advantage.std() + 1e-6)
    chunk, row = rolled.live.nonzero(as_tuple=True)
    kept = advantage[row] != 0  # groups that all succeed or all fail teach nothing
    chunk, row = chunk[kept], row[kept]
    if not len(row):
        return 0.0
    clipped = []
    for _ in range(epochs):
        for part in torch.randperm(len(row)).split(256):
            c, n = chunk[part], row[part]
            logp = policy(rolled.frame[c, n], rolled.task[n]).log_prob(rolled.token[c, n])
            ratio = (logp - rolled.logp[c, n]).exp()
            pull = advantage[n].view(-1, 1, 1)
            loss = -torch.minimum(ratio * pull, ratio.clamp(0.8, 1.28) * pull).sum((1, 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            clipped.append(((ratio < 0.8) | (ratio > 1.28)).float().mean().item())
    return float(np.mean(clipped))


def improve(
    policy: Policy, env: WorldEnv, *, updates: int, rollouts: int, group: int, lr: float, seed: int
) -> list[float]:
    """Improves the policy in the learned world; returns the judge's mean reward before each update."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    paid = []
    for i in range(updates):
        began = time.perf_counter()
        batches = max(1, rollouts // env.num_envs)
        starts = [np.repeat(rng.integers(env.starts, size=env.num_envs // group), group) for _ in range(batches)]
        rolled = join([roll(policy, env, rows) for rows in starts])
        clipped = update(policy, optimizer, rolled, group)
        paid.append(rolled.reward.mean().item())
        seconds = time.perf_counter() - began
        said = f"the judge pays {paid[-1]:.3f} of {len(rolled.reward)}, {clipped:.2f} clipped, {seconds:.1f} s"
        print(f"update {i + 1}/{updates}: {said}", flush=True)
    return paid


# The truth -------------------------------------------------------------------------------------------------------


def measure(policy: Policy, env: WorldEnv, episodes: int, *, greedy: bool) -> np.ndarray:
    """Returns (episodes,) bool, success from the first start states of ``env``."""
    rows = np.resize(np.arange(episodes), -(-episodes // env.num_envs) * env.num_envs).reshape(-1, env.num_envs)
    return np.concatenate([roll(policy, env, row, greedy=greedy).reward.numpy() for row in rows])[:episodes] > 0


def describe(won: np.ndarray) -> str:
    """Returns a rate with its 95 % interval (Wilson)."""
    z, n, p = 1.96, len(won), won.mean()
    middle, half = (p + z * z / 2 / n), z * np.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
    return f"{p:.3f} [{(middle - half) / (1 + z * z / n):.3f}, {(middle + half) / (1 + z * z / n):.3f}] of {n}"


def main() -> None:
    """Imitates, measures, improves in imagination, measures again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstrations", type=pathlib.Path, help="a LeRobot data set with pictures in its tables")
    parser.add_argument("--url", default="ws://127.0.0.1:8100", help="of launch/play.py RUN --rows N")
    parser.add_argument("--imitate", type=int, default=3000, metavar="N", help="updates of imitation (default 3000)")
    parser.add_argument("--updates", type=int, default=20, metavar="N", help="of GRPO (default 20)")
    parser.add_argument("--rollouts", type=int, default=256, metavar="N", help="of an update, at least (default 256)")
    parser.add_argument("--group", type=int, default=8, help="rollouts from one start; divides the rows (default 8)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of GRPO (default 2e-4)")
    parser.add_argument("--episodes", type=int, default=512, help="true ones that are measured (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    with WorldEnv(f"{args.url}/world") as world, WorldEnv(f"{args.url}/truth") as truth:
        if world.num_envs % args.group:
            parser.error(f"--group: expected a divisor of the server's {world.num_envs} rows, got {args.group}")
        policy = Policy(world.observation_shape, world.action_shape, len(world.instructions))
        imitate(policy, read_demonstrations(args.demonstrations, world), args.imitate)

        def tell(when: str) -> None:
            for greedy, how in ((False, "sampled"), (True, "greedy")):
                won = measure(policy, truth, min(args.episodes, truth.starts), greedy=greedy)
                print(f"{when}: true success, {how}: {describe(won)}", flush=True)

        tell("before")
        how = {"updates": args.updates, "rollouts": args.rollouts, "group": args.group, "lr": args.lr}
        improve(policy, world, **how, seed=args.seed)
        tell("after")


if __name__ == "__main__":
    main()
