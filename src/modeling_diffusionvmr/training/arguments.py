"""Training arguments: those of `transformers`, and how the number of proposals grows."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..checks import check_positive, is_number

PROPOSAL_SCHEDULES = ("progress", "stable")
# `Trainer` divides by these, or trains nothing
POSITIVE_FIELDS = (
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
POSITIVE_IF_SET = ("eval_accumulation_steps", "dataloader_prefetch_factor", "neftune_noise_alpha")


@dataclass
class DiffusionVMRTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the growth of the number of proposals (section 3.2 and Table 6 of the paper).

    Args:
        proposal_schedule: "progress" starts with 1 proposal and ends with `config.max_training_proposals`; "stable"
            uses all of them from the start.
        proposal_growth: share of the training, in (0, 1], over which "progress" increases the number at a constant
            rate.

    Raises:
        ValueError: for an unknown schedule, a growth out of range, or a field with which nothing would be trained.
    """

    _argument_group_name = "training (fields of DiffusionVMRTrainingArguments)"  # heads its flags in --help

    proposal_schedule: str = field(
        default="progress",
        metadata={
            "help": "Whether the number of proposals grows during training, or is the same throughout.",
            "choices": PROPOSAL_SCHEDULES,
        },
    )
    proposal_growth: float = field(
        default=1.0,
        metadata={"help": "Share of the training, in (0, 1], over which the number of proposals grows."},
    )

    def __post_init__(self):
        if self.proposal_schedule not in PROPOSAL_SCHEDULES:
            known = ", ".join(PROPOSAL_SCHEDULES)
            raise ValueError(f"`proposal_schedule` must be one of {known}, got {self.proposal_schedule!r}")
        if not is_number(self.proposal_growth) or not 0 < self.proposal_growth <= 1:
            raise ValueError(f"`proposal_growth` must be a number in (0, 1], got {self.proposal_growth!r}")
        for name in (*POSITIVE_FIELDS, *POSITIVE_IF_SET):
            if name in POSITIVE_FIELDS or getattr(self, name) is not None:
                check_positive(getattr(self, name), f"`{name}`")
        if self.max_steps != -1 and self.max_steps <= 0:
            raise ValueError(
                f"`max_steps` must be a number above 0, or -1 to train for `num_train_epochs`, got {self.max_steps}"
            )
        super().__post_init__()
