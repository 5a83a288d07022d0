"""Settings where everything can be computed: instruments to hold the rest against. Explained in docs/theory.md."""
