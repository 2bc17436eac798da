"""Benchmarks: data, protocols, runs, and the reports made from them."""
