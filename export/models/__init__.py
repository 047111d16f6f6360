"""EchoVLM and dense Qwen2-VL in plain PyTorch: one definition for distillation, calibration and graph export."""
