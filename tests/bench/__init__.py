"""Benchmarks on a real API server: every figure beside a floor that was measured in the same run, in turns with it."""
