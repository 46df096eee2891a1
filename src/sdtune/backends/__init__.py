"""WHERE IT RUNS: one package per place."""
