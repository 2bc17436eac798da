"""Benchmarks: datasets, protocols, the runner, its records, and the reports made from them."""
