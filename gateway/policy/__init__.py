"""Decisions as pure functions of state, request and time."""
