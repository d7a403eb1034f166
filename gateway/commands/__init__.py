"""The commands of `forebay`, a file for each group. Rooms are imported inside the commands, see `gateway.cli`."""
