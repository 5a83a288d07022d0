"""What is written to disk: safetensors with a manifest, atomic writes, run folders."""
