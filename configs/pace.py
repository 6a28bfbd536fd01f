"""The whole loop: base policy, world model, imagined GRPO, refresh, GRPO again.

Command:   python launch/train.py --config=configs/pace.py
Hardware:  two CPU cores, 6 GB of memory; no downloads
Expect:    see docs/tabletop.md for times and success rates

Presets: smoke and tiny (to check machines), pretrained (for the impatient: only the policy learns), relay (twelve
chunks, four sub-goals), lora (RL of adapters), paper and rlinf (the two reference bundles); on the real LIBERO (make
libero; docs/libero.md): libero_small, and from converted weights libero_spatial, libero_object, libero_goal, libero_10,
with rlinf_release after it RLinf's world model as released, and one_h100 or one_h200 last, for a single GPU.
``:libero_small,libero_smoke`` runs every stage of it with almost nothing in it. Each says below what it needs and
what to expect.

Settings that are not listed here keep the defaults of ``wovr_jax.run.recipe.Recipe``; a key ``size`` names a
size of a network, and keys beside it change that size.
"""

from configs import common


def get_config(preset: str = ""):
    settings = common.settings(
        job="pace",
        name="pace",
        seed=0,
        temperature=1.3,  # at 1.0 the base of few demonstrations tries too little
        policy={"size": "tabletop"},
        world={
            "size": "tabletop",
            "flow": {"steps": 5},
            "anchor": True,
            "memory": 4,
            "noisy_context": True,
            "vae_rows": 16,  # on a CPU a fifth faster than all at once, with half of the memory
        },
        reward={"size": "tabletop"},
        # Few demonstrations, none of them flawed: the base fails by what it has not seen, at every temperature.
        expert={"flaw": "none", "flawed_share": 0.0},
        collect={"demonstrations": 24, "first": 192, "again": 192, "retold": 384},
        **trainings(),
        starts={"share": 0.25, "rule": "last_chance", "before": 6, "room": 12, "event": "any", "each": 2},
        dream={
            "groups": 48,  # imagined rollouts cost no true episode, and a gradient of few of them is mostly noise
            "chunks": 3,
            "updates": (8, 8, 8),
            "rates": (1.0, 0.5),
            "world": "learned",
            "reward": "learned",
        },
        online_groups=12,
        learner={
            "lr": 5e-4,
            "warmup": 6,
            "epochs": 1,
            "minibatches": 2,
            "microbatch": 48,
            "weight_decay": 0.0,
            "grpo": {"group": 8, "clip_low": 0.2, "clip_high": 0.28, "kl": 0.0},
        },
        evaluate={"episodes": 512, "compare": 128, "videos": 3, "temperatures": (1.0, 0.5, 0.3)},
    )
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    presets = {"smoke": smoke, "tiny": tiny, "lora": lora, "libero_small": libero_small, "libero_smoke": libero_smoke}
    presets |= {"senses": senses, "relay": relay, "paper": paper, "rlinf": rlinf, "rlinf_release": rlinf_release}
    presets |= {"pretrained": pretrained, "one_h100": one_h100, "one_h200": one_h200}
    return common.with_preset(settings, preset, presets | {suite: on(suite) for suite in suites})


def trainings():
    """How policy, world model and classifier of the table learn from episodes."""
    return {
        "sft": {"optimizer": "muon", "steps": 400, "batch": 32, "lr": 5e-3, "early": 3},
        "world_train": {
            "optimizer": "muon",
            "steps": 2000,
            "batch": 32,
            "lr": 8e-3,
            "b2": 0.98,
            "weighting": "uniform",
            "start_share": 0.25,
            "shift": 3,  # episodes are few, and where the camera stands decides nothing
            "context_sigma": 0.05,  # WoVR's 5/24 hides where the gripper is to a pixel, and that decides a grasp
        },
        "refresh": {"steps": 1500, "lr": 8e-3},
        "reward_train": {
            "steps": 400,
            "batch": 64,
            "lr": 2e-3,
            "positive": 0.3,
            "extra": 0.4,
            "rule": "fixed",
            "threshold": 0.9,
        },
    }


def smoke(settings):
    """Every stage with almost nothing in it, to see a machine run them all; the numbers mean nothing."""
    settings.collect.update(demonstrations=32, first=32, again=16, retold=16)
    settings.sft.steps = settings.world_train.steps = settings.reward_train.steps = settings.refresh.steps = 10
    settings.world_train.own_memory = tuple(10 for _ in settings.world_train.get("own_memory", ()))
    settings.dream.update(groups=2, updates=(1, 1))
    settings.online_groups = 0
    settings.evaluate.update(episodes=32, compare=16, videos=1)


def tiny(settings):
    """Every stage with networks too small to learn, a VAE of their own too: whole runs in a minute, to be killed and
    compared (launch/tools/kill_test.py, docs/scaling.md). Batches are multiples of four devices."""
    settings.vae, settings.towers = "", ()
    for part in (settings.policy, settings.world, settings.reward):
        part.size = "fake"
    settings.sim = common.settings(**settings.get("sim", {}))
    settings.sim.update(size=16, horizon=16)
    settings.expert.update(flaw="early_release", flawed_share=0.5)
    settings.collect.update(demonstrations=32, validation=4, first=8, again=8, retold=8, batch=8)
    settings.vae_train = common.settings(steps=8, batch=4)
    settings.sft.update(steps=12, batch=8, validate_every=6)
    settings.world_train.update(steps=12, batch=8, shift=0, context_sigma=5 / 24)
    settings.world_train.own_memory = tuple(4 for _ in settings.world_train.get("own_memory", ()))
    settings.refresh.update(steps=8, lr=3e-3)
    settings.reward_train.update(steps=12, batch=16, extra=0.25, rule="rate", threshold=0.5)
    settings.dream.update(groups=4, chunks=2, updates=(4, 4), rates=(1.0, 1 / 3))
    settings.online_groups, settings.learner.lr = 0, 3e-4
    # All rollouts of a group end alike at this size; the entropy bonus moves the policy all the same.
    settings.learner.update(microbatch=8, grpo=common.settings(group=4, entropy=0.1))
    settings.evaluate.update(episodes=8, compare=8, videos=1)


def senses(settings):
    """A second camera, in the hand, and the robot's state: world model and policy have both. Before tiny too.

    Command:   python launch/train.py --config=configs/pace.py:senses
    Hardware:  two CPU cores, 6 GB of memory; no downloads
    Expect:    see docs/tabletop.md
    """
    settings.sim = common.settings(wrist=True, strip=16)
    settings.policy.update(images=2, proprio=3)
    settings.world.update(views=2, state=3)
    settings.vae = "tabletop_wrist_vae"


def pretrained(settings):
    """For the impatient: base policy, newest world model and classifier of another run; only the policy learns.

    The parts come with the package, from ``--config=configs/pace.py --config.seed=20``. Its 576 true episodes, of which
    the world model was made, are not in this run's ledger.

    Command:   python launch/train.py --config=configs/pace.py:pretrained
    Hardware:  two CPU cores, 3 GB of memory; no downloads
    Expect:    the base at 0.50 and 0.57, then 0.58 and 0.60, sampled and greedy (512 layouts, one run); 9 min 20 s on
               one busy core, of which the eight updates took 7 min 30 s
    """
    settings.seed = 20  # the statistics of these demonstrations say what the policy's tokens mean
    settings.update(policy_weights="tabletop_base", world_weights="tabletop_world", reward_weights="tabletop_reward")
    settings.sft.steps = settings.world_train.steps = settings.reward_train.steps = 0
    settings.update(pace=False)
    settings.dream.updates = settings.dream.updates[:1]


def relay(settings):
    """A horizon at which errors add up: lid aside, block onto a plate that moves, button; twelve chunks of eight.

    The demonstrations are few and clean, so the base policy fails where it has seen too little.

    Command:   python launch/train.py --config=configs/pace.py:relay
    Hardware:  two CPU cores, 6 GB of memory; no downloads
    Expect:    the base policy at 0.24 or 0.33 as sampled and 0.38 greedy (two seeds). Imagination improved the one, on
               which settings were chosen, and harmed the other; 45 min on one core, without the audit: docs/tabletop.md
    """
    settings.name, settings.temperature = "relay", 1.0  # over twelve chunks noise adds up: 0.08 at 1.3
    settings.relay = common.settings()
    settings.policy.size = "relay"
    settings.vae, settings.towers = "relay_vae", ("relay_dinov2", "relay_siglip")
    settings.sft.steps = 1600
    # From a keyframe there has to be time for what the expert needs from the start, 49 steps in the middle.
    settings.starts.update(before=16, room=48)
    settings.collect.update(demonstrations=128, first=384, again=192, retold=192)
    # Twelve chunks are long: errors that feed on themselves end with a round of memories of the model's own.
    settings.world_train.update(steps=4500, stride=2, shift=0, weight_decay=0.2, own_memory=(700,))
    # Most failures have a button that lights up, or a block on the plate: a judge of 400 steps called half of them won.
    settings.reward_train.update(rule="rate", steps=1500, swap=0.1)
    settings.dream.update(groups=32, chunks=12, updates=(12, 12))
    # A reward at the end of twelve chunks is a weak signal: with two minibatches nothing moved.
    settings.learner.minibatches = 8


def lora(settings):
    """After any other: RL trains adapters of rank 32 beside the policy, folded in at the end of each round."""
    settings.learner.lora = common.settings(size="rlinf", rank=32)


def paper(settings):
    """After any other: GRPO as WoVR states it in section 4.2 (``GRPOConfig.paper``), in groups as large as before.

    The advantage is the return minus the mean of the group, the mask ends with the step of the first success. A frame
    is a success where the classifier gives more than a half.
    """
    settings.reward_train.update(rule="fixed", threshold=0.5)
    settings.learner.grpo = common.settings(size="paper", group=settings.learner.grpo.group)


def rlinf(settings):
    """After any other: GRPO as RLinf runs it (``GRPOConfig.rlinf``), and the numerics of its world model.

    Advantages over the deviation of the group, a mask to the end of the chunk, groups that all agree left out. Times
    rounded to bfloat16, frames to 256 levels, the same noise in every chunk; the classifier's probability rounded. From
    a keyframe a rollout is as long as from the start.
    """
    settings.reward_train.update(rule="fixed", threshold=0.5)
    settings.learner.grpo = common.settings(size="rlinf", group=settings.learner.grpo.group)
    settings.world.update(eight_bit="floor", noise="fixed", dit=common.settings(sinusoid_dtype="bfloat16"))
    settings.world.flow.update(size="rlinf")
    settings.starts.deadline = False


def one_h100(settings):
    """After a suite or robot:franka, and after rlinf_release: all of it on one GPU of 80 GB, with adapters.

    Policy and world model are trained by adapters of rank 32, the world model's action layers whole. The world model's
    rate is ten times the suite's, as adapters want; that it is the best one was not measured. There are half of the
    updates; rollouts, budgets and losses are the suite's.

    Command:   python launch/train.py --config=configs/pace.py:libero_spatial,one_h100
    Hardware:  one H100 of 80 GB, by the planner's account (docs/scaling.md); 128 GB of host memory; not run
    Hours:     docs/scaling.md, by computation
    """
    _fit_one_gpu(settings, rows=8, microbatch=16)


def one_h200(settings):
    """As one_h100, in larger pieces: one GPU of 141 GB.

    Command:   python launch/train.py --config=configs/pace.py:libero_spatial,one_h200
    Hardware:  one H200 of 141 GB, by the planner's account (docs/scaling.md); 128 GB of host memory; not run
    Hours:     docs/scaling.md, by computation
    """
    _fit_one_gpu(settings, rows=32, microbatch=32)


def _fit_one_gpu(settings, rows, microbatch):
    lora(settings)
    settings.mesh = common.settings(data=1, fsdp=1)
    settings.world.vae_rows = rows
    settings.learner.microbatch = microbatch
    settings.dream.updates = tuple(-(-count // 2) for count in settings.dream.updates)
    if settings.world_train.steps:
        settings.world_train.update(lora=common.settings(size="wan", rank=32), lr=1e-4)
        settings.refresh.lr = 1e-4


def rlinf_release(settings):
    """After libero_spatial, libero_object or libero_goal: what RLinf releases for the suite, and RLinf's own recipe.

    World model, classifier and start states (KIR) stay as they come; only the policy learns, and no true step is taken
    before the evaluation. Goal's classifier knows the task, the other two do not. For libero_10 no start states are
    released.

    Command:   python launch/import_weights.py RLinf-Wan-LIBERO-<Suite> --out weights/<suite>_rlinf
               python -m data_prep.rlinf_starts RLinf-Wan-LIBERO-<Suite>/dataset --out data/<suite>_starts
               python launch/train.py --config=configs/pace.py:<suite>,rlinf,rlinf_release
    Hardware:  as the suite's
    """
    own = f"weights/{settings.name}_rlinf"
    settings.update(world_weights=f"{own}/dit.json", reward_weights=f"{own}/reward.json", assets=own, pace=False)
    settings.start_states = f"data/{settings.name}_starts"
    settings.reward = common.settings(**({"size": "resnet18_task"} if settings.name == "libero_goal" else {}))
    settings.world_train.steps = settings.reward_train.steps = 0
    settings.reward_train.update(rule="fixed", threshold=0.5)
    settings.dream.updates = (sum(settings.dream.updates),)
    settings.evaluate.closed = 0  # the start states do not say in which initial states their episodes began


def libero_small(settings):
    """One task of the real LIBERO from nothing: small networks, 64 pixels, demonstrations by the scripted expert.

    The expert drops the thing on its way in three of ten demonstrations and goes on without it, so that the base policy
    does too, and imagination can mend it. An action is held for two control steps, which halves the frames to be drawn.
    Training begins in layouts that the task draws, evaluation in all 50 official initial states and in 50 layouts that
    the task draws for it.

    Command:   python launch/train.py --config=configs/pace.py:libero_small --config.libero.workers=<cores>
    Hardware:  a CPU for the simulator, 1.2 GB a worker; a GPU makes the training short
    Hours:     2 h 34 min on two CPU cores; 6.2 GB
    Expect:    greedy 0.16, 0.48, 0.54 for base, imagined GRPO and PACE, sampled 0.48, 0.47, 0.49 (one seed, the
               official states twice, keyframes before releases alone: docs/libero_runs.md)
    """
    settings.name, settings.temperature = "libero_small", 1.0
    settings.libero = common.settings(
        suite="libero_object",
        tasks=(7,),  # pick up the milk and place it in the basket
        steps=96,
        scene=common.settings(size=64, wrist=False, drawing="fast", hard_reset=False, hold=2),
        expert=common.settings(flaw="early_release", flawed_share=0.3, noise=0.1, linger=6),
        demonstrations="",
        inits=(0, 50),
        train_inits=(),
        intervened_share=0.4,
        workers=2,
    )
    for part in (settings.policy, settings.world, settings.reward):
        part.size = "libero_small"
    settings.vae, settings.towers = "", ()
    settings.vae_train = common.settings(steps=1500, batch=8, lr=3e-3)
    settings.collect.update(demonstrations=200, validation=16, first=250, again=100, retold=100, batch=16)
    settings.sft.update(steps=1500, batch=32, lr=3e-3, frozen=())
    settings.world_train.update(steps=5000, latents="disk", stride=2, shift=0, context_sigma=5 / 24)
    settings.refresh.update(steps=500, lr=3e-3)
    settings.reward_train.update(steps=1000, rule="rate")
    # A group has to fail and succeed. From closing its fingers a demonstration needs 51 to 52 steps into the basket, so
    # with that much room every failure can still be mended, whether the milk was missed, dropped or let go.
    settings.starts.update(rule="last_chance", before=16, least=4, room=52)
    settings.dream.update(groups=12, chunks=12, updates=(12, 12), rates=(1.0, 1 / 3))
    settings.online_groups, settings.learner.lr = 0, 3e-4
    settings.evaluate.update(episodes=100, compare=32, closed=32, temperatures=(0.5,))


def libero_smoke(settings):
    """After a preset of LIBERO: every stage with almost nothing in it; the numbers mean nothing."""
    settings.libero.update(steps=80, inits=(0, 2))  # fewer, and not even the expert succeeds
    settings.libero.expert.update(flawed_share=0.5)
    settings.collect.update(demonstrations=6, validation=2, first=4, again=2, retold=4, batch=2)
    settings.vae_train.update(steps=4, batch=2)
    settings.sft.update(steps=4, batch=4)
    settings.world_train.update(steps=4, batch=4)
    settings.reward_train.update(steps=4, batch=16)
    settings.refresh.steps = 2
    settings.dream.update(groups=2, chunks=2, updates=(1, 1))
    settings.learner.update(microbatch=8, grpo=common.settings(group=2, clip_low=0.2, clip_high=0.28, kl=0.0))
    settings.evaluate.update(episodes=2, compare=2, videos=1)


def on(suite):
    """The preset of a suite at full size, from converted weights.

    The paper's budget: 1,500 true trajectories of the base policy, 1,000 of the improved one, 512 steps each. The base
    policy is a released OpenVLA-OFT, fine-tuned on one demonstration a task; the world model starts as Wan2.2-TI2V-5B
    with fresh action modules. RLinf's settings of GRPO; an update here is one optimizer step on 256 rollouts, a quarter
    of one of RLinf's iterations.

    Command:   python launch/import_weights.py Openvla-oft-SFT-libero-<suite>-traj1 --out weights/<suite>
               python launch/import_weights.py Wan2.2-TI2V-5B --out weights/wan
               python launch/train.py --config=configs/pace.py:<suite>
               with policy_weights, libero.release, world_weights and assets set where these folders lie elsewhere
    Hardware:  8 GPUs of 80 GB, 128 GB of host memory, 32 cores for the simulator (estimated)
    Hours:     about 100: 70 of imagined GRPO, as users of RLinf report, 30 of the rest (estimated)
    Expect:    the paper, after PACE and for the base policy: spatial 0.815 (0.615), object 0.820 (0.363),
               goal 0.775 (0.482), libero_10 0.358 (0.137). Not measured here.
    """

    def choose(settings):
        own = f"weights/{suite}"
        full_size(settings)
        settings.name = suite
        settings.libero = common.settings(
            suite=suite, steps=512, inits=(0, 50), train_inits=(), release=f"{own}/policy.rest/files", workers=32
        )
        settings.policy_weights = f"{own}/policy.json"
        settings.collect.update(demonstrations=0, validation=0, first=1500, again=1000, retold=192, batch=16)
        settings.sft.steps = 0
        settings.evaluate.update(episodes=500, compare=64, closed=64, temperatures=(1.0,))

    return choose


def full_size(settings):
    """The released networks, and how they learn: what the suites of LIBERO and a robot share."""
    settings.temperature = 1.6
    settings.policy.size = "openvla_7b"
    settings.world.update(size="wan", vae_rows=32)
    settings.world_weights = "weights/wan/dit.json"
    settings.reward.size = "resnet18_task"
    settings.assets, settings.vae, settings.towers = "weights/wan", "vae", ()
    settings.mesh = common.settings(data=1, fsdp=8)
    settings.world_train.update(
        optimizer="adamw",
        steps=50_000,
        batch=32,
        lr=1e-5,
        b2=0.999,
        weighting="bump",
        warmup=5,
        schedule="constant",
        start_share=0.05,
        start_cap=250,
        shift=0,
        context_sigma=5 / 24,
        latents="stream",
    )
    settings.refresh.update(steps=8_000, lr=1e-5)
    settings.reward_train.update(steps=15_000, batch=256, lr=1e-4, stride=8, rule="fixed", threshold=0.5)
    # Any change of the gripper: a sampled policy that failed goes on opening and closing until the horizon.
    settings.starts.update(share=1 / 3, rule="gripper_event", before=24, least=8, each=1)
    settings.dream.update(groups=32, chunks=32, updates=(400, 100), rates=(1.0,))
    settings.online_groups = 0
    settings.learner.update(lr=2e-5, warmup=0, minibatches=1, microbatch=32, weight_decay=0.01)
    settings.learner.grpo = common.settings(size="rlinf", group=8)
