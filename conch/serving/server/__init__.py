"""One tritonserver process: its flags, the binary or container it runs in, its health."""
