"""EchoVLM, Qwen2-VL and Qwen2.5-VL in plain PyTorch: one definition for distillation, calibration and graph export."""
