"""What `sonoedge distill` is made of: losses, the teacher's outputs, the training loop, its state and its curves."""
