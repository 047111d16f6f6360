"""Expert kernels: their arithmetic, their compilation ahead of time, and how TensorRT takes them as plugins."""
