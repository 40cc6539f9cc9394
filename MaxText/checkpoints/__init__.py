"""Checkpoints of parameters alone, read and written array by array."""
