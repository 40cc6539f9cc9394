"""Knowledge distillation on top of MaxText."""
