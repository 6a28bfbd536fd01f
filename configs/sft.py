"""A single stage of the loop, with the stages it needs: the base policy from demonstrations, and its true success.

It is judged on held-out demonstrations every 100 steps and at the end: loss, token accuracy, distance of the decoded
actions.

Command:   python launch/train.py --config=configs/sft.py[:preset]
           python launch/train.py --config=configs/sft.py:lora_oft --config.policy_weights=runs/pace/stages/sft/policy
Settings:  those of configs/pace.py, presets included
"""

from configs import common, pace


def get_config(preset: str = ""):
    names = preset.split(",")
    own = {"lora_oft": lora_oft, "lora_rlinf": lora_rlinf}
    settings = pace.get_config(",".join(name for name in names if name not in own))
    settings.job = settings.name = "sft"
    settings.policy_weights = ""  # where the policy starts; empty for random weights
    settings.sft.update(validate_every=100)
    return common.with_preset(settings, ",".join(name for name in names if name in own), own)


def lora_oft(settings):
    """Adapters as openvla-oft has them, nothing else is trained: rank 32, scale 0.5; needs policy_weights."""
    settings.sft.update(lora=common.settings(size="oft", rank=32), optimizer="adamw", lr=5e-4, frozen=())


def lora_rlinf(settings):
    """The same as RLinf has them: scale 1, also head and patch embeddings."""
    settings.sft.update(lora=common.settings(size="rlinf", rank=32), optimizer="adamw", lr=5e-4, frozen=())
