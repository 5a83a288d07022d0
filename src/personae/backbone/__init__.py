"""Denoisers and noise schedules behind one interface."""
