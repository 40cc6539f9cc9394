"""Runs on a TPU cluster of GKE: its slices, what is checked before a run is sent there, and what is sent."""
