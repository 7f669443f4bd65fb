"""What `fsr-hf demo` runs: the comparison of pruned with unpruned answers."""
