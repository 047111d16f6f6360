"""TensorRT engines of a bundle for one device profile: built, inspected, checked, written."""
