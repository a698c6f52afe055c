"""Benchmarks: every claim of speed in this project is a ratio printed by one of these."""
