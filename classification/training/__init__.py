"""From checked options to a trained student: job, step, epochs, evaluation."""
