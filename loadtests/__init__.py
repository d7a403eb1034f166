"""Loads for the gateway: benches, scenarios and simulations. Nothing here is imported by the gateway."""
