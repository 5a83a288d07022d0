"""What a client may own."""
