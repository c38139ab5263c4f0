"""The training of a model: configuration, step, trainer, checkpoints, progress."""
