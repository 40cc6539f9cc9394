"""Measurements of the loss and of the whole step: time in paired rounds, memory and FLOPs beside it."""
