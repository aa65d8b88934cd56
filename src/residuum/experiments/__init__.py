"""The papers' experiments, one file per paper."""
