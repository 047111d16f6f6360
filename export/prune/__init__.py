"""Students cut out of a teacher of any size: fewer layers, narrower everywhere, fewer experts, a smaller vocabulary."""
