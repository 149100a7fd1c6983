"""The paper's experiments on real data: ``python -m benchmarks.paper NAME``."""
