"""The kernels: what runs over messages."""
