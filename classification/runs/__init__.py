"""Run folders, checkpoints, metrics, ranks and signals."""
