"""Distillation by the Trainer of Hugging Face's transformers; imported only on demand."""

try:
    import accelerate  # noqa: F401  (the Trainer needs it)
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mgd.huggingface needs transformers and accelerate: `pip install transformers accelerate`, or the extra "
        "[huggingface] of this project"
    ) from error

from mgd.huggingface.metrics import accuracy_and_f1
from mgd.huggingface.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "accuracy_and_f1"]
