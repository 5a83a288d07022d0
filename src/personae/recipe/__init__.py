"""From one TOML to a run and back: configuration, construction, and what a user does with a run."""
