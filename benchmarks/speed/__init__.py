"""How fast: ``python -m benchmarks.speed NAME``."""
