"""Benchmarks: speed and memory beside the peers, in turn, in one run (`ptv2 bench`)."""
