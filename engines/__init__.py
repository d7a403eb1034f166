"""The engines Forebay stands in front of: how each is started, spoken to and understood."""
