"""The benchmark: what a fused step buys on the parameter shapes of real models.

`python -m gradfused.bench` runs it, `--help` and `--list` say what it can do.
"""
