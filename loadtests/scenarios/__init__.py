"""Load that a person can run and watch: scenarios, what asks for them, and the report of what came back."""
