"""Divergences that are a sum over tokens of a term of p and q, one small file each; named.py finds them by name."""
