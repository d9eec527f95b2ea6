"""Checkpoints: finding, reading and loading them, and their tokenizers."""
