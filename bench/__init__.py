"""The benchmark: how long gradfused's optimizer steps and functions take, next to other ways of computing the same.

`python -m gradfused.bench` runs it, and its options `--help` and `--list` say what it can do.
"""
