"""Training and evaluation: arguments, presets, dataset, collator, trainer, checkpoints, metrics, prediction."""
