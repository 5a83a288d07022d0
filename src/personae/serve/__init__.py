"""An inference server: it begins pictures with the shared model, and clients finish them with their own."""
