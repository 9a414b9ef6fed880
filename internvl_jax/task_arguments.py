"""The leaves of the configuration that are tasks' own: plain dataclasses, as those of `internvl_jax.arguments`.

Names are TRL's where it has them.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(kw_only=True, slots=True)
class PreferenceConfig:
  """Preference optimization (MPO), under TRL's names."""

  # One loss or a comma list, e.g. "sigmoid,bco_pair"; None trains by supervised fine-tuning.
  loss_type: str | None = None
  # How closely the policy is held to the reference: the larger, the closer.
  beta: float = 0.1
  # Probability that a pair's answers are the wrong way round, for the losses that take one into account.
  label_smoothing: float = 0.0
  # Weight of the chosen answers' cross-entropy.
  rpo_alpha: float | None = None
  # Weights of the losses of `loss_type`, in its order; () takes the fields below, and 1 for a loss that has none.
  loss_weights: tuple[float, ...] = ()
  # Weight of "sigmoid" in a comma list.
  sigmoid_loss_weight: float = 1.0
  # Weight of "hinge" in a comma list.
  hinge_loss_weight: float = 1.0
  # Weight of "ipo" in a comma list.
  ipo_loss_weight: float = 1.0
  # Weight of "bco_pair" in a comma list.
  bco_pair_loss_weight: float = 1.0
  # Weight of "sppo_hard" in a comma list.
  sppo_hard_loss_weight: float = 1.0
  # Weight of "nca_pair" in a comma list.
  nca_pair_loss_weight: float = 1.0
  # Weight of "robust" in a comma list.
  robust_loss_weight: float = 1.0
  # Weight of "aot" in a comma list.
  aot_loss_weight: float = 1.0
  # Weight of "aot_pair" in a comma list.
  aot_pair_loss_weight: float = 1.0
  # Weight of "exo_pair" in a comma list.
  exo_pair_loss_weight: float = 1.0
  # Compute the reference policy's log-probabilities once, before training, and keep them on disk; otherwise the
  # reference is held in memory beside the policy.
  precompute_reference: bool = False
  # Folder of what was computed; None: `reference_logps` in training.output_dir.
  reference_cache_dir: str | None = None
  # A pair's answers share their prompt's tokens. Models with attention windows lay pairs out in full all the same.
  share_prompts: bool = True
  # A meta file of held-out pairs, which are judged at the end of a run and, by eval_strategy, during it.
  eval_meta_path: str | None = None

  @property
  def kinds(self) -> tuple[str, ...]:
    """The losses of `loss_type`."""
    return () if self.loss_type is None else tuple(kind.strip() for kind in self.loss_type.split(","))

  @property
  def terms(self) -> tuple[tuple[str, float], ...]:
    """The losses of `loss_type` with their weights."""
    weights = self.loss_weights or tuple(
      getattr(self, LOSS_WEIGHTS[kind]) if kind in LOSS_WEIGHTS else 1.0 for kind in self.kinds
    )
    return tuple(zip(self.kinds, weights, strict=True))


_WEIGHT = "_loss_weight"

LOSS_WEIGHTS: dict[str, str] = {
  field.name.removesuffix(_WEIGHT): field.name
  for field in dataclasses.fields(PreferenceConfig)
  if field.name.endswith(_WEIGHT)
}
"""Preference loss -> its own weight's field in `PreferenceConfig`; TRL gives newer losses none."""


@dataclasses.dataclass(kw_only=True, slots=True)
class DistillationConfig:
  """Distillation: the model that trains also learns the next-token probabilities of a teacher."""

  # The teacher: a checkpoint in either layout, a PEFT adapter's folder, the URL of one in a bucket (gs://, s3://), or a hub
  # id; None trains without.
  teacher: str | None = None
  # How many of the teacher's likeliest next tokens are kept for each supervised token; all others are one class together.
  top_k: int = 64
  # What the logits of teacher and student are divided by.
  temperature: float = 1.0
  # Weight of the divergence from the teacher; the labels' cross-entropy has 1 less this.
  weight: float = 0.5
  # The divergence: "forward" is KL(teacher, student), "reverse" KL(student, teacher).
  divergence: Literal["forward", "reverse"] = "forward"
  # Folder of the teacher's log-probabilities, or of a bucket's; None: `teacher_logps` in training.output_dir.
  cache_dir: str | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class GrpoConfig:
  """Reinforcement by verifiable rewards (GRPO, GSPO): answers are sampled and scored, under TRL's names."""

  # Rewards by which sampled answers are scored, by name or as "module:function"; () trains in another way.
  reward_funcs: tuple[str, ...] = ()
  # Weights of the rewards, in their order; () is 1 each.
  reward_weights: tuple[float, ...] = ()
  # Answers that are sampled for each prompt: a group.
  num_generations: int = 8
  # Longest answer in tokens, the one that ends it among them.
  max_completion_length: int = 512
  # What logits are divided by before tokens are drawn, and in the loss.
  temperature: float = 1.0
  # Tokens are drawn from the fewest likeliest ones whose probabilities sum to this; 1: from all.
  top_p: float = 1.0
  # Tokens are drawn from so many of the likeliest ones; 0: from all.
  top_k: int = 0
  # Prompts that each data-parallel device answers at once; None: all of a step's. Fewer need less memory for the cache.
  rollout_batch_size: int | None = None
  # The step's own forward pass decides which tokens are drawn, and how probable they were; the decoder only proposes them.
  # None: with bf16=False, where the two hardly ever differ.
  exact_rollouts: bool | None = None
  # How losses of tokens become one: by answer ("grpo"), by token ("bnpo" of a micro-batch, "dapo" of a step), over a constant
  # ("dr_grpo"), or by token with weights that are clipped in place of ratios ("cispo").
  loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"
  # Ratios of probabilities are of each token (GRPO), or of each answer, per token (GSPO).
  importance_sampling_level: Literal["token", "sequence"] = "token"
  # How far below 1 a ratio counts.
  epsilon: float = 0.2
  # How far above 1 a ratio counts; None: as far as below.
  epsilon_high: float | None = None
  # Steps that learn from the same sampled answers.
  num_iterations: int = 1
  # Weight of the KL divergence from the model as it was at the start; 0: that one is not held in memory.
  beta: float = 0.0
  # What an answer's distance from its group's mean reward is divided by: the standard deviation of the group's rewards,
  # that of the whole step's, or nothing.
  scale_rewards: Literal["group", "batch", "none"] = "group"
  # Answers that were cut at `max_completion_length` are not learned from.
  mask_truncated_completions: bool = False
  # Write the answers to so many prompts, with their rewards, at every step that is logged.
  num_completions_to_print: int = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class FlashTrainingConfig:
  """Training of InternVL3.5-Flash (ViCO): a tile learns to do with a quarter of its tokens where that changes no answer."""

  # "consistency" teaches the model to answer alike when tiles are compressed, and makes a Flash of a model that is none;
  # "router" then trains its router alone to choose the tiles; "none" trains in another way.
  stage: Literal["none", "consistency", "router"] = "none"
  # Probability that the consistency stage compresses a tile, each by itself.
  compressed_share: float = 0.5
  # Tiles may be compressed, the router stage teaches, whose compression changes answers by less than this percentile of what
  # the last tiles' did.
  percentile: float = 50.0
  # How many of the last tiles that percentile is taken of.
  window: int = 1024
  # Thresholds of a model that is made a Flash, for its config.json: a tile is compressed whose probability is above this
  # quantile of the question's tiles,
  relative_threshold: float = 0.3
  # and at least this.
  absolute_threshold: float = 0.5
