"""Fine-tuning beside plain baselines: images per CPU second and memory of a step."""
