"""The kernels of a step in Triton. They import nothing of gradfused: ``layout.define`` tells them what its tables look like."""
