"""The edge: HTTP in, refusals and relayed answers out."""
