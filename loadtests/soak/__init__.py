"""Everything at once for some minutes: gateways, stores and real engines, killed and stopped under load."""
