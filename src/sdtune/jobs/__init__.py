"""WHAT IS LAUNCHED: pure nouns of launching a run; no cloud, no torch."""
