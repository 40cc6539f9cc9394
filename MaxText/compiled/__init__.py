"""Compiled programs, read from their text."""
