"""What training does, stage by stage: scales (teq), codes (clip, gptq, bias, tune), and the whole model (distill)."""
