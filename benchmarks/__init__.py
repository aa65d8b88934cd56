"""Benchmarks: plain scripts, each prints a table of ratios; results in README.md beside them."""
