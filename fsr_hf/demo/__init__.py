"""What `fsr-hf demo` runs: a small LLaVA from nothing, and the comparison of pruned with unpruned answers."""
