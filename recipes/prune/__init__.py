"""Pruning: single weights, N of M, and whole channels, by block reconstruction."""
