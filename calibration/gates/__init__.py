"""Gates: the samples that they are trained on, and their training."""
