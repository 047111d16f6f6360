"""What turns a checkpoint into a bundle: models, distillation, INT8, graphs, and checks of each step."""
