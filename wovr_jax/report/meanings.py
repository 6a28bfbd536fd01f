"""What the curves of a run mean: a sentence for every metric that a training writes to ``metrics.jsonl``."""

from __future__ import annotations

KINDS = {"_start": ", of those that begin with an episode", "_keyframe": ", of those that begin at a keyframe"}
"""Endings of names that tell rollouts apart by where they begin."""

MEANINGS = {
    # GRPO: its rollouts
    "success": "share of the rollouts that are paid",
    "true_success": "share of the watched rollouts that succeed in truth",
    "false_success": "share of the watched failures that are paid all the same",
    "precision": "share of the watched payments that are true",
    "return_mean": "mean return of a rollout",
    "length": "share of the steps before the first success or the deadline",
    "mixed": "share of the groups in which some are paid and some are not",
    "lost": "share of the groups in which none is paid",
    "won": "share of the groups in which all are paid",
    "groups": "groups of an iteration",
    "kept_groups": "groups that the policy learned from",
    # GRPO: its update
    "steps": "optimizer steps of an iteration",
    "skipped": "1 where an iteration changed nothing",
    "ratio_mean": "new over old probability of a token, mean",
    "ratio_max": "the largest of these ratios",
    "ratio_gap": "largest log ratio before the first step; rounding, unless actor and learner disagree",
    "clip_fraction": "share of the tokens whose ratio was clipped",
    "kl": "divergence from the base policy, where it is asked for; of a VAE, of its latents from a normal",
    "kl_step": "divergence of the policy before an iteration from the one after",
    # every training
    "loss": "what the training makes small",
    "grad_norm": "norm of the gradient before it is clipped",
    "entropy": "spread of the policy's tokens, in nats; 0 is certain",
    "accuracy": "share of the guesses that are right",
    # on what no training sees
    "val_loss": "the loss on held-out episodes",
    "val_accuracy": "share of the held-out tokens guessed right",
    "val_l1": "distance of the guessed actions from the held-out ones",
    # world model and VAE
    "velocity_mse": "squared error of the predicted velocity, unweighted",
    "val_sample_mse": "squared error of imagined latents on held-out windows",
    "val_copy_mse": "the same for a picture that stands still",
    "edge": "absolute error of the edges in its pictures",
    "psnr": "likeness of its pictures to the true ones, in dB",
    "progress": "squared error of the progress in successful episodes",
}


def explain(name: str) -> str:
    """Returns what a metric means; empty for one that nobody explained."""
    for ending, words in KINDS.items():
        if meaning := name.endswith(ending) and explain(name.removesuffix(ending)):
            return meaning + words
    return MEANINGS.get(name, "")
