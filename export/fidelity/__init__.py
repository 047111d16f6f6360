"""The fidelity report: what INT8 changes in a model's answers, measured against the float model on the same frames."""
